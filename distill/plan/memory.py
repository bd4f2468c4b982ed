"""Bytes per rank by part, for every way to share the student; and the moment of a step when most of them exist at once.

Ψ is the number of parameters, Ψt of those trained, n the ranks, b the bytes of a value on the device (2 in half precision, 4 else).
"""

from dataclasses import dataclass

from distill.plan import activations
from distill.plan.job import Job, Strategy


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, by part; the parts do not all exist at once, so `peak` is below their sum.

    Attributes:
        parameters: of the student, and of the losses themselves.
        gradients: as they are between backward and step.
        optimizer: AdamW's two moments, and the float32 master copy where the parameters are in half precision.
        activations: between forward and backward.
        logits: the objective's workspace and the head's gradient.
        features: what losses on activations keep.
        teacher: its weights, features and taps.
        buffers: half-precision casts, reduction buckets, gathered parameters, temporaries of the step: the most that exist at once.
        peak: the most that exist at once.
        moment: when that is.
        host: bytes in the host's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    features: int
    teacher: int
    buffers: int
    peak: int
    moment: str
    host: int


@dataclass(frozen=True)
class State:
    """What a strategy holds of the student on one rank, in bytes.

    Attributes:
        parameters: always there.
        gradients: from backward to step, and all the time when gradients are accumulated.
        optimizer: always there.
        always: buffers that are always there.
        running: buffers during forward and backward.
        reducing: buffers during backward.
        stepping: temporaries of the optimizer step.
        host: in the host's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    always: int = 0
    running: int = 0
    reducing: int = 0
    stepping: int = 0
    host: int = 0


def replicated(job: Job, ranks: int) -> State:
    """One process, or DDP: everything on every rank.

    `wΨ + wΨt + 2wΨt`, w the bytes of a weight: 4 in float32 and in mixed precision, 2 in true half precision (AdamW's moments have the
    dtype of the parameters). DDP's reducer has buckets of `wΨt` beside the gradients. Autocast keeps half-precision copies of the
    matrices, `2Ψ`, from forward to backward. torch's AdamW makes temporaries of `wΨt` on a GPU (its foreach implementation), and none
    on a CPU (its fused one).
    """
    w, trained = job.weight, job.trainable
    return State(
        parameters=w * job.parameters,
        gradients=w * trained,
        optimizer=2 * w * trained,
        always=w * trained if ranks > 1 else 0,
        running=_casts(job, job.student.parameters),
        stepping=_temporaries(job, trained),
    )


def _temporaries(job: Job, trained: int) -> int:
    return job.weight * trained if job.device == "cuda" else 0


def _casts(job: Job, values: int) -> int:
    looked_up = 0 if job.student.tied else job.student.embedding
    return job.compute * max(0, values - looked_up) if job.mixed else 0


def fsdp2(job: Job, ranks: int) -> State:
    """FSDP2: parameters, gradients and moments sharded, `(w + w + 2w) Ψ / n`; float32 shards in mixed precision.

    Gathered at once, in the compute dtype: two layers (one computes, the next is on its way), and embedding, head and last norm, which the
    root keeps. The gradients of a layer, and of the root, exist whole until they are reduced, in w bytes.
    """
    w = job.weight
    shard, trained = -(-job.parameters // ranks), -(-job.trainable // ranks)
    root = job.parameters - job.student.layers * job.student.layer
    gathered = 2 * job.student.layer + root
    return State(
        parameters=w * shard,
        gradients=w * trained,
        optimizer=2 * w * trained,
        running=job.compute * gathered,
        reducing=w * gathered,
        stepping=_temporaries(job, trained),
    )


def zero12(job: Job, strategy: Strategy, ranks: int) -> State:
    """DeepSpeed's ZeRO-1 and ZeRO-2 (`runtime/zero/stage_1_and_2.py` of 0.19.8), after Rajbhandari et al. 2019, arXiv 1910.02054.

        parameters  bΨ, flat
        gradients   bΨt (stage 1) or bΨt / n (stage 2); in half precision they are summed in half precision
        optimizer   12Ψt / n: master copy and both moments in float32; the master copy is there in float32 too
        backward    two reduction buckets of `reduce_bucket_size` values, whole however small the model (Lightning overlaps them)
        step        the partition's gradient flat, `bΨt / n`, and in float32, `4Ψt / n`; AdamW's temporaries, `4Ψt / n`

    Offloaded: the optimizer's states and the float32 gradient are the host's, and no temporaries of the step are on the device.
    """
    b = job.compute
    part = -(-job.trainable // ranks)
    gradients = b * (job.trainable if strategy.zero == 1 else part)
    return State(
        parameters=b * job.parameters,
        gradients=gradients,
        optimizer=0 if strategy.offload else 12 * part,
        reducing=2 * b * strategy.bucket,
        stepping=0 if strategy.offload else (b + 4 + 4) * part,
        host=(12 + 4 + b) * part if strategy.offload else 0,
    )


def zero3(job: Job, strategy: Strategy, ranks: int) -> State:
    """DeepSpeed's ZeRO-3 (`runtime/zero/stage3.py` of 0.19.8).

        parameters  bΨ / n
        gradients   bΨt / n, one flat buffer
        optimizer   12Ψt / n
        always      one reduction bucket of `reduce_bucket_size` values
        gathered    at most `stage3_max_live_parameters` values, and never more than Ψ
        step        by sub-groups: the gradient flat and in float32, and AdamW's temporaries, `(b + 4 + 4)` bytes a value

    Offloaded (optimizer and parameters): the host has `(12 + 4 + b + b) Ψ / n`, its float32 gradient included.
    """
    b = job.compute
    shard, part = -(-job.parameters // ranks), -(-job.trainable // ranks)
    away = strategy.offload
    return State(
        parameters=0 if away else b * shard,
        gradients=0 if away else b * part,
        optimizer=0 if away else 12 * part,
        always=b * strategy.bucket,
        running=b * min(job.parameters, strategy.live),
        stepping=0 if away else (b + 4 + 4) * min(part, strategy.sub_group),
        host=b * shard + (12 + 4 + b) * part if away else 0,
    )


def state(job: Job, strategy: Strategy, ranks: int) -> State:
    """What a strategy holds of the student on one of n ranks."""
    if strategy.fsdp:
        return fsdp2(job, ranks)
    if not strategy.zero:
        return replicated(job, ranks)
    return zero3(job, strategy, ranks) if strategy.zero == 3 else zero12(job, strategy, ranks)


def teacher_weights(job: Job, ranks: int) -> int:
    """Bytes of the teacher's weights: all of them on every rank, or `1/n` and two gathered layers, with embedding and head."""
    if job.teacher is None:
        return 0
    shape, e = job.teacher, job.teacher_bytes
    if not job.teacher_sharded or ranks == 1:
        return e * shape.parameters
    rest = shape.parameters - shape.layers * shape.layer
    return e * (-(-shape.parameters // ranks) + 2 * shape.layer + rest)


def _exact(job: Job, strategy: Strategy) -> tuple[int, int]:
    """The most while they are measured, and what is kept of them until the step."""
    if not job.exact or strategy.fsdp or strategy.zero == 3:  # where parameters are in shards it is refused
        return 0, 0
    one = job.weight * job.student.trainable
    return (job.exact + (job.accumulate > 1)) * one, job.exact * one


def memory(job: Job, strategy: Strategy, ranks: int) -> Memory:
    """Bytes by part, and the peak: the largest of these moments.

    - the objective: activations and the teacher's outputs are there, and the workspace of a chunk;
    - the losses on activations: theirs in the place of the workspace;
    - the measurement of exact gradients: one of the student per term, and one more where they are added to earlier micro-batches';
      they stay until the step;
    - the start of the backward pass: the gradients of what those losses compared, and a layer's own temporaries;
    - the end of the backward pass: all gradients (and a tied embedding's second one), no activations;
    - the step: all gradients and the optimizer's temporaries.

    Gradients of earlier micro-batches are there all the time when they are accumulated.
    """
    job = job.under(strategy)
    held = state(job, strategy, ranks)
    acts, work = activations.kept(job), activations.logits(job)
    head, chunk_head = activations.head_gradient(job)
    compared, passing = activations.compared(job), activations.transient(job)
    stays, on_the_way = activations.of_teacher(job)
    weights = teacher_weights(job, ranks)
    base = held.parameters + held.optimizer + held.always + weights
    waiting = held.gradients if job.accumulate > 1 else 0
    forward = base + waiting + held.running
    twice = job.weight * job.student.embedding if job.student.tied else 0
    measuring, measured = _exact(job, strategy)
    moments = {
        "teacher": forward + acts + stays + on_the_way,
        "objective": forward + acts + stays + work + head + chunk_head + measured,
        "features": forward + acts + stays + compared + head + measured,
        "exact gradients": forward + acts + stays + passing + measuring,
        "backward": forward + acts + compared // 2 + passing + head + held.reducing + measured,
        "end of backward": base + held.gradients + held.running + held.reducing + passing + twice + measured,
        "step": base + held.gradients + held.stepping + measured,
    }
    moment = max(moments, key=lambda name: moments[name])
    return Memory(
        parameters=held.parameters,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=acts + passing,
        logits=work + head + chunk_head,
        features=compared,
        teacher=weights + stays,
        buffers=held.always + max(held.running + held.reducing, held.stepping),
        peak=moments[moment],
        moment=moment,
        host=held.host,
    )
