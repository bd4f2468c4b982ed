"""Quality: one pass over the held-out data for any model of a run, beside the teacher."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from distill.callbacks.preemption import Preemption
from distill.module import DistillModule
from distill.parallel.through import through


@torch.no_grad()
def evaluate(trainer: pl.Trainer, module: DistillModule, model: nn.Module | None = None) -> dict[str, float]:
    """Measure a model (the student, if none is given) on the validation data, exactly: sums over all ranks, divided once.

    Returns:
        `count` valid positions; `loss` in nats and `accuracy` in [0, 1]; with a teacher also `teacher_loss`, `teacher_accuracy`,
        `kl` in nats (forward, T = 1) and `agreement` in [0, 1]. Only a `count` of 0 where there are no validation data.
    """
    model = module.student if model is None else model
    assert model is not None, "configure_model comes first"
    training = model.training
    model.eval()
    total: dict[str, torch.Tensor] = {}
    preemption = next((c for c in trainer.callbacks if isinstance(c, Preemption)), None)  # type: ignore[attr-defined]
    for batch in _limited(module.data.val_dataloader(), trainer.limit_val_batches):
        if preemption is not None:
            preemption.leave_if_asked(trainer)
        with trainer.precision_plugin.val_step_context():
            sums = through(trainer, "measures", trainer.strategy.batch_to_device(batch), model)
        total = {name: total.get(name, 0) + value for name, value in sums.items()}
    model.train(training)
    if not total:
        return {"count": 0.0}
    reduced = trainer.strategy.reduce(torch.stack([*total.values()]), reduce_op="sum")
    values = dict(zip(total, reduced.tolist(), strict=True))
    count = values.pop("count")
    return {"count": count, **{name: value / count for name, value in values.items()}}


def _limited(batches: Any, limit: float | int | None) -> Iterator[Any]:
    """As many batches as Lightning would take: an int counts them, a float is their share."""
    count = limit if isinstance(limit, int) else int(len(batches) * (1.0 if limit is None else limit))
    iterable: Iterable[Any] = batches
    return itertools.islice(iterable, count)


def teacher_part(measured: dict[str, float], before: dict[str, float] | None = None) -> dict[str, float]:
    """The teacher's own figures, out of those of any model that was measured beside it.

    Args:
        measured: of that model.
        before: of a teacher that cannot be measured now, see `Teacher.measured`; none where that was on fewer or more positions, e.g. all
            while `limit_val_batches` takes a few: figures of different rows would stand beside each other.
    """
    if "teacher_loss" not in measured:
        return before if before and before["count"] == measured["count"] else {}
    return {
        "count": measured["count"],
        "loss": measured["teacher_loss"],
        "accuracy": measured["teacher_accuracy"],
        "kl": 0.0,
        "agreement": 1.0,
    }


def student_part(measured: dict[str, float]) -> dict[str, float]:
    """The figures of the model itself."""
    return {name: value for name, value in measured.items() if not name.startswith("teacher_")}


def retention(student: dict[str, float], teacher: dict[str, float]) -> float:
    """How much of the teacher's accuracy a student has, `accuracy_s / accuracy_t`, in [0, ∞); NaN where it is not known."""
    return student["accuracy"] / teacher["accuracy"] if teacher.get("accuracy", 0) > 0 else math.nan
