"""One real micro-step of the models of a plan, with random weights, on this machine."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import psutil
import torch

from distill import objective
from distill.losses.base import Loss
from distill.plan import models
from distill.plan.describe import Described
from distill.plan.job import ALONE
from distill.plan.memory import memory
from distill.students.base import Student
from distill.types import ConfigError


class MicroStep:
    """One forward and backward pass of a micro-batch, on models with random weights and random tokens; call it.

    Args:
        described: the plan.
        student: as the YAML names it.

    Attributes:
        models: student and teacher, or None in its place.

    Raises:
        ConfigError: they do not fit on this machine.
    """

    def __init__(self, described: Described, student: Student) -> None:
        self.described, job = described, described.job
        self.device = torch.device(job.device)
        _refuse_what_does_not_fit(described, self.device)
        self.compute = torch.float32 if job.compute == 4 else torch.bfloat16 if job.precision.startswith("bf16") else torch.float16
        with self.device:
            self.models = self._student(student), self._teacher()
            self.batch = _batch(described)
        for term in described.terms.values():
            term.to_empty(device=self.device).at(0, 1)
            for p in term.parameters():
                torch.nn.init.normal_(p, std=0.02)
        self.taps = [term for term in described.terms.values() if isinstance(term, Loss)]

    def _student(self, student: Student) -> Any:
        job = self.described.job
        dtype = torch.float32 if job.weight == 4 else self.compute
        model: Any = models.build(self.described.task, self.described.student, student.attn_implementation, student, dtype)
        if job.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _teacher(self) -> Any | None:
        if self.described.teacher is None:
            return None
        dtype = torch.float32 if self.described.job.teacher_bytes == 4 else self.compute
        return models.build(self.described.task, self.described.teacher, None, dtype=dtype)

    def __call__(self) -> None:
        """Forward and backward."""
        described, job = self.described, self.described.job
        (student, teacher), task = self.models, described.task
        with torch.autocast(self.device.type, self.compute) if job.mixed else nullcontext():
            outputs = task.outputs(student, self.batch, {t for loss in self.taps for t in loss.student_taps})
            target = None
            if teacher is not None:
                with torch.no_grad():
                    target = task.outputs(teacher, self.batch, {t for loss in self.taps for t in loss.teacher_taps})
            weights = dict.fromkeys(described.terms, 1.0)
            micro = objective.evaluate(described.terms, weights, outputs, target, self.batch, job.classes, job.chunk, job.norms)
        (micro.total / job.valid).backward()


def seconds_of(step: Callable[[], None], device: str, repeats: int = 2) -> float:
    """Seconds of the fastest of a few micro-steps, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _batch(described: Described) -> dict[str, torch.Tensor]:
    job = described.job
    ids = torch.randint(0, described.student.get_text_config().vocab_size, (job.batch, job.length))
    labels = torch.randint(0, job.classes, (job.batch, job.length if job.unit == "token" else 1))
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def _refuse_what_does_not_fit(described: Described, device: torch.device) -> None:
    need = memory(described.job, ALONE, 1).peak
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > room:
        raise ConfigError(
            f"--measure runs a micro-step here, which needs about {need / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free; leave it out to "
            "estimate from --tflops and --mfu, or measure on the machine that will train"
        )
