"""What the costs of a teacher follow from: looked up, counted, or measured once, in the dry run."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import pytorch_lightning as pl
import torch
from torch import nn

from distill.data.digest import valid_positions
from distill.losses.base import Divergence, Loss, Term
from distill.module import DistillModule
from distill.tasks import unwrap
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.online import OnlineTeacher
from distill.teachers.remote import RemoteTeacher
from distill.teachers.served import ServedTeacher
from distill.types import Batch, Outputs, Support, Target

ROOM = 0.9  # of the device's memory that a run may be planned to take: estimates are that good
Kind = Literal["online", "cached", "remote", "served", "other"]


class Figure(NamedTuple):
    """A number, and whether it was measured or follows from others."""

    value: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """The run at hand.

    Attributes:
        source: where its teacher is.
        support: what the teacher's target is known on.
        weights: bytes of the teacher's weights in the memory of a rank, if it is or were there; None where that is not known.
        int8: the same with the linears but the head in 8 bits; None where they are few bits already, or the layers are not known.
        others: bytes that all else takes on the device.
        room: bytes of the device.
        forward: seconds that the teacher takes for one micro-batch; None where no model was asked.
        micro_batches: in a step, on one rank.
        ranks: how many train.
        batch_size: rows of a micro-batch.
        rows: of the training data.
        valid: positions with a label in them.
        steps: that the run takes.
        positions: of a micro-batch, padding included.
        predictions: positions of a micro-batch that enter the head.
        labels: positions with a label in a step, on one rank.
        width: D of the teacher's features and hidden states; None where its layers are not known.
        item: bytes of one of their values.
        taps: how many hidden states of the teacher the terms ask for.
        classes: V.
        allowed: kinds of target that every term with a teacher is right on.
        temperatures: those of the terms with a teacher.
        disk: bytes that are free.
        store: bytes of the store in use; None where there is none.
    """

    source: Kind
    support: Support
    weights: Figure | None
    int8: float | None
    others: float
    room: float
    forward: Figure | None
    micro_batches: int
    ranks: int
    batch_size: int
    rows: int
    valid: int
    steps: int
    positions: int
    predictions: int
    labels: int
    width: int | None
    item: int
    taps: int
    classes: int
    allowed: frozenset[Support]
    temperatures: frozenset[float]
    disk: float
    store: float | None = None

    @property
    def per_step(self) -> Figure | None:
        """Seconds of the teacher in a step: those of a micro-batch times their number."""
        return self.forward and Figure(self.forward.value * self.micro_batches)

    @property
    def steps_per_epoch(self) -> float:
        """Rows over those of a global batch."""
        return self.rows / (self.batch_size * self.micro_batches * self.ranks)

    @property
    def epochs(self) -> float:
        """How often the run sees the rows."""
        return self.steps / self.steps_per_epoch

    def fits(self, weights: float) -> bool:
        """Whether a teacher of so many bytes has room beside all else."""
        return self.others + weights <= ROOM * self.room


def situation(trainer: pl.Trainer, module: DistillModule, batch: Batch, others: float) -> Situation:
    """Look the run up, after a step of it.

    Args:
        trainer: of the run.
        module: with a teacher.
        batch: a micro-batch, on the device.
        others: bytes that all but the teacher takes on the device.
    """
    teacher, data = module.teacher, module.data
    assert teacher is not None, "there is a teacher"
    terms = list(module.terms.values())
    taps = {tap for term in terms if isinstance(term, Loss) for tap in term.teacher_taps}
    with trainer.strategy.precision_plugin.train_step_context():
        seconds, target = timed(teacher, batch, taps)
    source, described, structure = kind(teacher), teacher.describe(), teacher.structure()
    dtype = getattr(torch, str(described.get("dtype")), None)
    item = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    labels = int(batch["num_valid"])
    return Situation(
        source=source,
        support=teacher.support,
        weights=weights(teacher, described, trainer.world_size),
        int8=None if structure is None or few_bits(teacher) else int8_bytes(unwrap(structure), item),
        others=others,
        room=float(room(module.device)),
        forward=None if source == "cached" else Figure(seconds, measured=True),
        micro_batches=trainer.accumulate_grad_batches,
        ranks=trainer.world_size,
        batch_size=data.batch_size,
        rows=len(data.train_set),
        valid=valid_positions(data.train_set),
        steps=int(trainer.estimated_stepping_batches),
        positions=batch["input_ids"].numel(),
        predictions=batch["labels"].numel(),
        labels=labels,
        width=None if structure is None else unwrap(structure).config.get_text_config().hidden_size,
        item=target.features.element_size() if isinstance(target, Outputs) else item,
        taps=len(taps),
        classes=data.num_classes,
        allowed=allowed(terms),
        temperatures=temperatures(terms),
        disk=float(shutil.disk_usage(Path.cwd()).free),
        store=described["store_megabytes"] * 1e6 if source == "cached" else None,
    )


def timed(teacher: Teacher, batch: Batch, taps: Iterable[str]) -> tuple[float, Target]:
    """Ask the teacher once: seconds, and its target."""
    cuda = batch["input_ids"].is_cuda
    torch.cuda.synchronize() if cuda else None
    start = time.perf_counter()
    target = teacher(batch, taps)
    torch.cuda.synchronize() if cuda else None
    return time.perf_counter() - start, target


def kind(teacher: Teacher) -> Kind:
    """Where a teacher is."""
    kinds: dict[type[Teacher], Kind] = {
        OnlineTeacher: "online",
        CachedTeacher: "cached",
        RemoteTeacher: "remote",
        ServedTeacher: "served",
    }
    return next((name for cls, name in kinds.items() if isinstance(teacher, cls)), "other")


def weights(teacher: Teacher, described: dict[str, float], ranks: int) -> Figure | None:
    """Bytes in the memory of a rank: counted where they are there, else those that the model has elsewhere."""
    if "megabytes" not in described:
        return None
    here = kind(teacher) in ("online", "other")
    share = ranks if isinstance(teacher, OnlineTeacher) and teacher.sharded else 1
    return Figure(described["megabytes"] * 1e6 / share, measured=here)


def few_bits(teacher: Teacher) -> bool:
    """Whether its weights are quantised, or cannot be."""
    return isinstance(teacher, OnlineTeacher) and bool(teacher.quantize or teacher.sharded)


def int8_bytes(model: nn.Module, item: int) -> float:
    """Bytes of a model as `quantise` leaves it: a byte a weight of every linear but the head, and a scale a row.

    Args:
        model: with weights or without.
        item: bytes of a value of the rest.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]  # of transformers
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    small = sum(m.weight.numel() for m in linears)
    rest = sum(p.numel() for p in model.parameters()) - small
    return float(small + item * (rest + sum(m.out_features for m in linears)))


def room(device: torch.device) -> int:
    """Bytes of memory: the GPU's, or the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def allowed(terms: Iterable[Term]) -> frozenset[Support]:
    """The kinds of target that every term with a teacher is right on."""
    found: frozenset[Support] = frozenset({"classes", "bins", "draws", "text"})
    for term in terms:
        found = found & term.supports if term.needs_teacher else found
    return found


def temperatures(terms: Iterable[Term]) -> frozenset[float]:
    """Every T that a term has at the start and the end of the run; 1 where a term has none."""
    found: set[float] = set()
    for term in terms:
        if not term.needs_teacher or isinstance(term, Loss):
            continue
        inside = [part for part in term.modules() if isinstance(part, Divergence)]  # a term may wrap another
        found |= {part.temperature(step, 1) for part in inside for step in (0, 1)} or {1.0}
    return frozenset(found)
