"""What callbacks that mask a student have in common: when masks are set, what is logged, what is saved."""

from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import PreTrainedModel

from distill.compress.base import Compression
from distill.compress.pruner import Pruner
from distill.tasks import Task
from distill.types import Batch, ConfigError


class Masking(Compression):
    """Sets the masks of a pruner at the start of optimizer steps.

    Args:
        pruner: holds the masks.
        begin: share of all optimizer steps after which masking begins.
        end: share after which it is as strong as it will be.
        every: optimizer steps between two masks.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(self, pruner: Pruner, begin: float, end: float, every: int) -> None:
        self.check_ranges(
            ("begin", begin, 0 <= begin < 1, "in [0, 1), a share of all steps"),
            ("end", end, begin <= end <= 1, f"from begin ({begin}) to 1, a share of all steps"),
            ("every", every, every >= 1, "at least 1"),
        )
        self.pruner, self.begin, self.end, self.every = pruner, begin, end, every
        self.student: PreTrainedModel | None = None  # that is trained, from the start of fit
        self._step = -1  # that the masks are of
        self._logged = "train/sparsity"

    @classmethod
    def key(cls) -> str:
        """What messages call it."""
        return f"trainer.callbacks: {cls.__name__}"

    @classmethod
    def check_ranges(cls, *values: tuple[str, Any, bool, str]) -> None:
        """Refuse values: each is given by name, value, whether it is fine, and what it must be."""
        for name, value, fine, wanted in values:
            if not fine:
                raise ConfigError(f"{cls.key()}.{name} must be {wanted}, got {value}")

    @abstractmethod
    def update(self, trainer: pl.Trainer, step: int, first: int, last: int, batch: Batch) -> None:
        """Set the masks anew where they are due; on every rank alike.

        Args:
            trainer: of the student.
            step: optimizer steps done.
            first: where masking begins.
            last: where it is as strong as it will be; a step of this training.
            batch: the first micro-batch of this step.
        """

    @property
    def remembers(self) -> bool:
        """Whether the masks keep what small steps add up to, scores or distances."""
        return False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a precision too coarse for what is added up.

        Raises:
            ConfigError: weights of half precision, under scores that are learned or distances from where a weight began.
        """
        self._step = -1
        if stage == "fit" and self.remembers and str(trainer.precision) in ("bf16-true", "16-true"):
            raise ConfigError(
                f"{self.key()} adds up small steps of the optimizer, which trainer.precision={trainer.precision} rounds away; take "
                "bf16-mixed, or Pruning with method: magnitude or wanda"
            )

    @property
    def state_key(self) -> str:
        """Tells several maskings of one student apart."""
        return self._generate_state_key(**{k: v for k, v in vars(self.pruner).items() if k in ("include", "exclude", "structure")})

    def state_dict(self) -> dict[str, Any]:
        """Keep which step the masks are of: a run that was stopped within its window must not set them twice."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._step = state_dict["step"]

    def prepare(self, student: PreTrainedModel, task: Task) -> None:
        """Put the masks on."""
        self.pruner.prepare(student)

    def finish(self, student: PreTrainedModel) -> PreTrainedModel:
        """Write the zeros into the weights, or cut the parts out."""
        self.pruner.finish(student)
        return student

    def summary(self) -> list[str]:
        """How far it has come."""
        if self.student is None:
            return []
        masked, total = self.pruner.counts(self.student)
        return [f"masked {masked:,} of {total:,} {self.pruner.unit}"]

    def figures(self) -> dict[str, Any]:
        """The sparsity that was reached."""
        if self.student is None:
            return {}
        masked, total = self.pruner.counts(self.student)
        return {"sparsity": masked / total, "masked": masked, "of": total, "unit": self.pruner.unit}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of the student, and refuse what other compressions do with it."""
        student: Any = pl_module.student
        self.student = student
        several = [callback for callback in trainer.callbacks if isinstance(callback, Masking)]  # type: ignore[attr-defined]
        self._logged = "train/sparsity" if len(several) == 1 else f"train/sparsity_{several.index(self) + 1}"
        self.pruner.check(student)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Set the masks where they are due, once before each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        with torch.no_grad():
            self.update(trainer, self._step, *self.span(trainer), batch)

    def span(self, trainer: pl.Trainer) -> tuple[int, int]:
        """The optimizer steps at which masking begins and is as strong as it will be."""
        total = int(trainer.estimated_stepping_batches)
        first = min(int(self.begin * total), total - 1)
        return first, max(first, min(int(self.end * total), total - 1))  # masks are set before a step, so there is none at `total`

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Log the sparsity that is reached, counted from the masks; `train/sparsity`, or with a number of its own where several mask."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        if every and trainer.global_step != self._step and trainer.global_step % every == 0:
            assert self.student is not None, "on_fit_start comes first"
            masked, total = self.pruner.counts(self.student)
            pl_module.log(self._logged, masked / total)
