"""What a teacher is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning.strategies import Strategy
from torch import nn

from distill.tasks import Task
from distill.types import Batch, Support, Target


class Teacher(ABC):
    """Gives the target for a batch. Not an `nn.Module`, so that Lightning, DDP, the optimizer and checkpoints never see its weights."""

    name: str  # what the banner and the report call it

    def recipe_needed(self) -> str | None:
        """Give the config that must run first because it makes this teacher, or None when the teacher is there."""
        return None

    @abstractmethod
    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Make ready on a device; called at every start, and does nothing the second time.

        Args:
            task: how to load and run the model.
            device: where batches will be.
            dtype: the compute dtype of the trainer, taken where the configuration names none.
        """

    @abstractmethod
    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Make sure that the teacher means the same by an id as the data do (after `setup`).

        Args:
            tokenizer: the data's.
            expected: what a model's config must say for these data, e.g. `vocab_size` or `label2id`.

        Raises:
            ConfigError: another tokenizer, or other classes.
        """

    def check_rows(self, fingerprint: Callable[[], str]) -> None:  # noqa: B027  # most answer for any row
        """Make sure that the teacher knows the training rows, where it was asked about them before (after `check`).

        Args:
            fingerprint: gives a hash of their content; takes a pass over them.

        Raises:
            ConfigError: it was asked about other rows.
        """

    def check_routes(self, names: Sequence[str]) -> None:  # noqa: B027  # most teach every row
        """Take the names of teachers that a column of the data holds, after `check`; none where there is no such column.

        Raises:
            ConfigError: it needs them and there are none, or they are not its own.
        """

    def spread(self, strategy: Strategy) -> None:  # noqa: B027  # most stay whole
        """Make sure that all ranks hold the same, and leave each a part where that was asked for; called at every start, after `check`.

        No strategy knows of the teacher, so none does it.

        Args:
            strategy: of the trainer; its process group is up.

        Raises:
            ConfigError: the ranks hold different weights.
        """

    @abstractmethod
    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Target:
        """Give the target of a batch, without a graph."""

    @property
    def support(self) -> Support:
        """What its target is known on (after `setup`). Only one of all `classes` can measure a student on any row."""
        return "classes"

    @property
    def temperature(self) -> float | None:
        """The T that its target was made with, where it cannot be softened after; None where it can be."""
        return None

    def ahead(self, batch: Batch) -> None:  # noqa: B027  # most have nothing to prepare
        """Begin to fetch the target of a batch that `__call__` will be asked for soon; must not wait. Called in the data's order."""

    def beside(self, student: nn.Module) -> None:  # noqa: B027  # most do not look at it
        """See the student, once it is made and before any strategy wraps it."""

    def models(self) -> list[nn.Module]:
        """The models that it holds in memory, after `setup`; none where the target comes from elsewhere."""
        return []

    def structure(self) -> nn.Module | None:
        """A model of its layers and configuration, for those who match layers or count rows, with weights or without (after `setup`)."""
        return next(iter(self.models()), None)

    def assert_frozen(self) -> None:
        """Stop where anything has made the teacher trainable: a teacher that moves is silently wrong."""
        for model in self.models():
            assert not model.training, "the teacher is in training mode"
            assert not any(p.requires_grad for p in model.parameters()), "the teacher has trainable parameters"

    def measured(self) -> dict[str, float]:
        """Give `count`, `loss` and `accuracy` on the validation rows, of a teacher that was measured before and cannot be now."""
        return {}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Give parameters, bytes and dtype, for the banner and the report (after `setup`)."""
