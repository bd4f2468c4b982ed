"""Bytes that a forward pass keeps for the backward pass, and what the loss needs beside them."""

from distill.plan.job import Job, Shape

COPIES = 8  # float32 tensors `[block, V]` that exist at once while a block's terms are evaluated: logits, log-probabilities, gradients


def of_layer(shape: Shape, job: Job) -> int:
    """Bytes that one layer keeps per position.

    Korthikanti et al. 2022 (arXiv 2205.05198, equation 1) count `34 h` bytes per position and layer in 16 bits, and `5 a s` for the
    attention scores, which fused attention (sdpa, flash) does not keep. Theirs is a layer of GPT with dropout. For one of Llama, as
    transformers writes it, the tensors that autograd saves are, in values:

        norms      2 × (x  h,  x̂  h,  y  h)      x in float32 whatever the precision: RMSNorm is written out in torch
        attention  q, k, v and its output:  2 q + kv
        FFN        gate, silu(gate), up, product:  4 f;  without a gate  2 f
        statistics 1 / rms of both norms, log-sum-exp of every head, in float32

    Under autocast every matrix product casts its own copy of y (3 for q, k, v; 2 for gate and up), and x̂ is float32. With probabilities
    kept (`eager`) there are `2 a s` more. Counted on a CPU these are exact for Llama; a LayerNorm keeps `h` less than an RMSNorm.
    """
    e = job.compute
    casts = 5 if shape.gated else 4
    norms = (16 + casts * e) * shape.width if job.mixed else 2 * (4 + 2 * e) * shape.width
    attention = e * (2 * shape.queries + shape.keys)
    maps = 2 * e * shape.heads * job.length if shape.maps else 0
    inner = e * (4 if shape.gated else 2) * shape.inner
    return norms + attention + maps + inner + 4 * (2 + shape.heads)


def kept(job: Job) -> int:
    """Bytes between forward and backward: every layer's, or with checkpointing the input of every layer; and the last norm's."""
    residual = job.weight * job.student.width
    last = (4 + job.weight) * job.student.width
    per_layer = residual if job.checkpointing else of_layer(job.student, job)
    return job.positions * (job.student.layers * per_layer + last)


def transient(job: Job) -> int:
    """Bytes of the backward pass through one layer: the gradients of its widest values, and with checkpointing its activations again."""
    shape, e = job.student, job.compute
    gradients = e * (3 if shape.gated else 2) * shape.inner + 2 * job.weight * shape.width
    return job.positions * (gradients + (of_layer(shape, job) if job.checkpointing else 0))


def logits(job: Job) -> int:
    """Bytes of the chunked objective beside the head's gradient: constant in the number of tokens but for three rows of features.

    The student's and the teacher's logits of a chunk, `[chunk, V]` in the compute dtype, one room of the same size for the gradient of
    the objective (or one per term, where norms are measured), and `COPIES` float32 tensors of a block; the valid rows of both
    features, and the gradient of the student's in float32. See `losses.chunked`.
    """
    rows = min(job.chunk, job.valid)
    sides = 1 if job.teacher is None else 2
    rooms = job.terms if job.norms else 1
    width = job.student.width if job.student.head else job.classes
    per_chunk = rows * job.classes * job.compute * (sides + rooms)
    return per_chunk + 4 * COPIES * min(job.block, rows) * job.classes + job.valid * width * (4 + job.weight)


def head_gradient(job: Job) -> tuple[int, int]:
    """Bytes of the head's gradient: the float32 sum over the chunks, and a chunk's own beside it while it is added (`[V, D]` each)."""
    if not (job.student.head and job.student.head_trains):
        return 0, 0
    again = 4 if job.valid > job.chunk else 0  # a single chunk's own is the sum
    cast = job.compute if job.compute < 4 else 0
    return 4 * job.student.head, (again + cast) * job.student.head


def compared(job: Job) -> int:
    """Bytes that losses on activations keep, in float32: the student's vectors, and their difference to the teacher's."""
    return 4 * job.positions * job.compared


def of_teacher(job: Job) -> tuple[int, int]:
    """Bytes of the teacher's forward pass: what stays until the losses are done (features and taps), and the widest layer on the way."""
    if job.teacher is None:
        return 0, 0
    shape, e = job.teacher, job.teacher_bytes
    stays = e * (2 * shape.width * job.valid + job.teacher_taps * job.positions)
    passing = e * job.positions * ((3 if shape.gated else 2) * shape.inner + 2 * shape.width)
    return stays, passing
