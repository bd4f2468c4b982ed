"""Floating-point operations of a step, and from them tokens per second and hours."""

from dataclasses import dataclass

from distill.plan.job import Job, Shape


@dataclass(frozen=True)
class Speed:
    """How fast.

    Attributes:
        tokens_per_s: positions of all ranks per second.
        hours: of the whole training, or None where the number of steps is not known.
        measured: whether a micro-step was run, or hardware figures were taken.
        basis: what the figures rest on, in words.
    """

    tokens_per_s: float
    hours: float | None
    measured: bool
    basis: str


def forward_flops(shape: Shape, length: int, causal: bool = True) -> float:
    """Operations of a forward pass per position: `2 N + 4 L q s`, the second term halved under a causal mask.

    N are the parameters that are multiplied with (an embedding is looked up, unless it is the head too), L the layers, q the width of
    the queries, s the length: `Q Kᵀ` and `P V` are `2 q s` each (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B).
    """
    multiplied = shape.parameters - (0 if shape.tied else shape.embedding)
    attention = 4 * shape.layers * shape.queries * length
    return 2.0 * multiplied + (attention / 2 if causal else attention)


def flops_per_position(job: Job) -> float:
    """Operations of a training step per position: student forward and backward, teacher forward.

    `3 F` for a student whose parameters are all trained (`6 N` and attention): forward, gradients of the inputs, gradients of the weights,
    the last only for what is trained. `F` of the layers again with checkpointing. `F` of the teacher, once. Where norms are measured, each
    further term goes back through the head: `2 V D`.
    """
    causal = job.unit == "token"
    student = forward_flops(job.student, job.length, causal)
    weights = student * job.student.trainable / job.student.parameters
    again = student - 2.0 * job.student.head if job.checkpointing else 0.0
    norms = 2.0 * job.student.head * max(0, job.terms - 1) if job.norms else 0.0
    teacher = 0.0 if job.teacher is None else forward_flops(job.teacher, job.length, causal)
    return 2 * student + weights + again + norms + teacher


def estimated(job: Job, ranks: int, steps: int | None, tflops: float, mfu: float) -> Speed:
    """From hardware figures: `tokens/s = n · TFLOP/s · share / flops per position`.

    Args:
        job: what a rank does.
        ranks: n.
        steps: optimizer steps of the training; None where unknown.
        tflops: peak of one device in 10^12 operations a second, dense, in the precision of the products.
        mfu: the share of the peak that is reached, operations of checkpointing and teacher counted.
    """
    rate = ranks * tflops * 1e12 * mfu / flops_per_position(job)
    return Speed(rate, _hours(job, ranks, steps, rate), False, f"{tflops:g} TFLOP/s × {mfu:.0%}")


def scaled(job: Job, ranks: int, steps: int | None, seconds: float, device: str) -> Speed:
    """From one micro-step measured here: n devices like this one, communication hidden behind it.

    Args:
        job: what a rank does.
        ranks: n.
        steps: optimizer steps of the training; None where unknown.
        seconds: of a forward and backward pass of one micro-batch.
        device: what it was measured on, in words.
    """
    rate = ranks * job.positions / seconds
    return Speed(rate, _hours(job, ranks, steps, rate), True, f"one micro-step of {seconds:.3g} s on {device}, × {ranks}")


def _hours(job: Job, ranks: int, steps: int | None, rate: float) -> float | None:
    return None if steps is None else steps * job.positions * job.accumulate * ranks / rate / 3600
