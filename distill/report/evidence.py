"""What a report is written from: the models of a run, what each said at every position, and what the run left behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distill.data.base import DistillData
from distill.metrics.bootstrap import Resampler
from distill.tasks import Task
from distill.types import Batch, DistillError, Target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TEACHER, BEFORE, ALONE = "teacher", "student before", "student alone"


class NotMeasured(DistillError):
    """A figure could not be measured; the message says why, as the report will."""


@dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    Attributes:
        target: what it says of a batch; of a student and an export `Outputs`.
        model: its module, for what needs gradients or hooks; None where it is none of torch.
        files: the folder or file that is shipped; None where there is none.
        runtime: what it is shipped for, where that is not what `target` asks: times of `target` would be those of something else.
    """

    target: Callable[[Batch], Target]
    model: nn.Module | None = None
    files: Path | None = None
    runtime: str | None = None


@dataclass(frozen=True)
class Against:
    """One model beside the teacher, at each of N positions.

    Attributes:
        kl: KL(p ‖ q) at T = 1, nats; p is the teacher's.
        reverse_kl: KL(q ‖ p) at T = 1, nats.
        acceptance: Σ_v min(p_v, q_v), in [0, 1]: how often a token that the student drafts is accepted in speculative decoding.
        overlap: share of the teacher's k likeliest classes that are among the model's k likeliest, in [0, 1].
        rank: Spearman's correlation of the wrong classes' probabilities, in [−1, 1]; NaN where it was not looked at.
    """

    kl: Floats
    reverse_kl: Floats
    acceptance: Floats
    overlap: Floats
    rank: Floats


@dataclass(frozen=True)
class Columns:
    """What one model says at each of N positions.

    Attributes:
        nll: −log q(label), nats.
        top: the likeliest class.
        confidence: its probability.
        entropy: −Σ_v q_v log q_v, nats.
        brier: Σ_v (q_v − [v = label])², in [0, 2].
        against: beside the teacher; None for the teacher, and where there is none.
        logits: of the sampled positions, `[S, V]` float32; None where V is large, see `observe`.
        scaled: of the sampled positions, NLL and top probability at each temperature of `metrics.temperature.TEMPERATURES`, `[S, 2, K]`.
    """

    nll: Floats
    top: Ints
    confidence: Floats
    entropy: Floats
    brier: Floats
    against: Against | None
    logits: NDArray[np.float32] | None
    scaled: NDArray[np.float32]

    def correct(self, labels: Ints) -> Bools:
        """Whether the likeliest class is the label."""
        return self.top == labels


@dataclass(frozen=True)
class Observed:
    """One pass over held-out rows.

    Attributes:
        labels: `[N]`, the class of each position.
        rows: `[N]`, which row a position belongs to, 0 to R − 1, never falling: positions of a row are not independent.
        sample: `[S]`, the positions at which more was looked at.
        models: by name, the teacher as `TEACHER`.
        top_k: k of `Against.overlap`.
        num_classes: V.
        of_rows: how many held-out rows there are; R ≤ of_rows were looked at.
        tokens: a hash of those of the R rows, whatever batches they came in.
    """

    labels: Ints
    rows: Ints
    sample: Ints
    models: Mapping[str, Columns]
    top_k: int
    num_classes: int
    of_rows: int
    tokens: bytes = b""

    @cached_property
    def resampler(self) -> Resampler:
        """The same resamples for every model and figure, so that differences are paired."""
        return Resampler(self.rows)

    @property
    def teacher(self) -> Columns:
        """The teacher's columns.

        Raises:
            NotMeasured: it has none.
        """
        if TEACHER not in self.models:
            raise NotMeasured("there is no teacher that gives probabilities of all classes for held-out rows")
        return self.models[TEACHER]


@dataclass(frozen=True)
class Evidence:
    """All that a chapter may look at.

    Attributes:
        folder: of the run, e.g. `runs/NAME`.
        student: the name of the final student among `subjects`, e.g. `student distilled`.
        subjects: the models, by name, in the order in which they are shown.
        task: of all of them.
        data: after `setup`.
        device: where the models are.
        batches: of the held-out rows that were looked at, in order; on the CPU.
        observed: what they said.
        run: `report.json` as the run left it.
        log: the lines of `metrics.jsonl`.
        config: the resolved configuration.
        absent: why a model that one would expect is not among `subjects`, by its name.
    """

    folder: Path
    student: str
    subjects: Mapping[str, Subject]
    task: Task
    data: DistillData
    device: torch.device
    batches: list[Batch]
    observed: Observed
    run: Mapping[str, Any]
    log: list[dict[str, Any]]
    config: Mapping[str, Any]
    absent: Mapping[str, str] = field(default_factory=dict)
