"""Hours of training: a real micro-step of two small models with the layers of the teacher, and operations counted from there."""

from typing import Any

import torch

from distill.advise.blocks import small_config
from distill.advise.parts import Figure
from distill.advise.shapes import on_meta
from distill.layers import layers_of
from distill.losses.base import Setting
from distill.losses.chunked import block_size, chunk_size
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.plan import models, speed
from distill.plan.describe import Described
from distill.plan.job import Job, Shape
from distill.plan.measure import MicroStep, seconds_of
from distill.students.load import FromConfig
from distill.tasks import Task

ROWS = 2
MFU = 0.35  # of a peak, as `distill plan` takes it


def job(task: Task, teacher: Shape, student: Shape, classes: int, length: int, device: str) -> Job:
    """A training step of hard and soft labels.

    Args:
        task: of both.
        teacher: its sizes.
        student: the same.
        classes: V.
        length: positions of a row.
        device: `cpu` or `cuda`.
    """
    at = torch.device(device)
    return Job(
        student=student,
        teacher=teacher,
        batch=ROWS,
        length=length,
        accumulate=1,
        precision="32-true" if device == "cpu" else "bf16-mixed",
        checkpointing=False,
        teacher_bytes=4 if device == "cpu" else 2,
        unit=task.unit,
        classes=classes,
        chunk=chunk_size(classes, at),
        block=block_size(classes, at),
        terms=2,
        device=device,
    )


def rate(task: Task, config: Any, length: int, device: str) -> Figure:
    """Operations a second of training: a micro-step of two layers of the teacher teaching two such layers.

    Raises:
        ConfigError: it does not fit into memory.
    """
    small = small_config(config)
    shape = models.shape_of(on_meta(task, small), "--teacher")
    text = small.get_text_config()
    found = job(task, shape, shape, text.num_labels if task.unit == "sample" else text.vocab_size, length, device)
    described = Described(found, task, small, small, _terms(task, small, found))
    seconds = seconds_of(MicroStep(described, FromConfig({})), device)
    return Figure(
        speed.flops_per_position(found) * found.positions / seconds, True, f"a step of {ROWS} × {length} tokens in {seconds:.2g} s"
    )


def promised(tflops: float, gpus: int) -> Figure:
    """Operations a second of GPUs elsewhere: their peak and the share of it that is reached."""
    return Figure(tflops * 1e12 * MFU * gpus, False, f"{gpus} × {tflops:g} TFLOP/s × {MFU:.0%}")


def hours(task: Task, teacher: Shape, student: Shape, tokens: int, length: int, rate: Figure) -> Figure:
    """Hours to train a student on so many tokens with the teacher beside it: `tokens · operations a token / operations a second`."""
    flops = speed.flops_per_position(job(task, teacher, student, 2, length, "cpu"))  # classes play no part in the count
    return Figure(tokens * flops / rate.value / 3600, False, f"{tokens / 1e6:,.3g}M tokens; {rate.basis}")


def _terms(task: Task, config: Any, job: Job) -> dict[str, Any]:
    layers = layers_of(on_meta(task, config), "--teacher")
    terms: dict[str, Any] = {"ce": CrossEntropy(), "kd": ForwardKL()}
    for name, term in terms.items():
        term.prepare(
            Setting(
                key=f"model.losses.{name}",
                unit=task.unit,
                num_classes=job.classes,
                class_counts=lambda: torch.ones(job.classes, dtype=torch.long),
                class_name=str,
                num_samples=job.classes,
                batch_size=ROWS,
                micro_batch=ROWS,
                packed=False,
                student=layers,
                teacher=layers,
            )
        )
    return terms
