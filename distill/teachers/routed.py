"""A teacher for each kind of row."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from distill.parallel.gradients import shards_parameters
from distill.teachers.base import Teacher
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from distill.teachers.rows import some_rows, spread_rows
from distill.teachers.several import Several
from distill.types import IGNORE_INDEX, Batch, ConfigError, MixedTarget


class Routed(Several):
    """Each row is taught by the teacher that a column of the data names, see `data.route_column`; packed rows document by document.

    A teacher runs only on the rows of a batch that hold something of its own. There are no activations: no layer is that of all rows.

    Args:
        teachers: by the names in the column.

    Raises:
        ConfigError: a teacher is sharded over the ranks, which must all run it equally often.
    """

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        super().__init__(teachers)
        for key, part in teachers.items():
            if isinstance(part, OnlineTeacher) and part.sharded:
                raise ConfigError(
                    f"model.teacher.teachers.{key} is sharded, so all ranks must run it equally often, but how many rows name it is a "
                    "matter of the batch; set sharded: false"
                )
        self.name = " | ".join(f"{key}: {part.name}" for key, part in teachers.items())
        self.names: list[str] = []

    def check_routes(self, names: Sequence[str]) -> None:
        """Compare the teachers with those that the data name.

        Args:
            names: what the numbers of the batch column `route` stand for.

        Raises:
            ConfigError: the data name none, or one that is not there.
        """
        here = ", ".join(self.parts)
        if not names:
            raise ConfigError(f"the data name no teachers; set data.route_column to the column that says which of {here} teaches a row")
        if missing := [name for name in names if name not in self.parts]:
            shown = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
            raise ConfigError(
                f"the column data.route_column names {shown}, but model.teacher.teachers has only {here}; add the teacher, or mend the rows"
            )
        for name in self.parts:
            if name not in names:
                rank_zero_warn(f"model.teacher.teachers.{name} teaches no row: the data name {', '.join(names)}")
        self.names = list(names)

    def spread(self, strategy: Strategy) -> None:
        """Spread each.

        Raises:
            ConfigError: the student teaches, and its weights are in parts on the ranks, which must all run it equally often.
        """
        if shards_parameters(strategy) and any(isinstance(part, SelfTeacher) for part in self.teachers):
            raise ConfigError(
                "model.teacher: one of the teachers is the student itself, whose weights this trainer.strategy cuts into shards, and how "
                "many rows name it is a matter of the batch; take trainer.strategy=zero2 or ddp"
            )
        super().spread(strategy)

    def ahead(self, batch: Batch) -> None:
        """Tell each of its rows."""
        for share in self._shares(batch):
            share.teacher.ahead(some_rows(batch, share.rows))

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> MixedTarget:
        """Ask each for its rows.

        Raises:
            ConfigError: activations are wanted.
        """
        if wanted := list(taps):
            raise ConfigError(
                f"model.losses: a term compares activations ({', '.join(wanted[:3])}), but the rows have different teachers "
                f"({', '.join(self.parts)}), whose layers are not the same; take terms on predictions, e.g. ForwardKL"
            )
        parts, own = [], []
        for share in self._shares(batch):
            target = share.teacher(some_rows(batch, share.rows))
            assert not isinstance(target, MixedTarget), "the constructor has refused such a teacher"
            parts.append(spread_rows(target, share.rows, len(share.own)))
            own.append(share.own)
        weights = torch.stack(own, -1).float() if own else torch.zeros(*batch["labels"].shape, 0, device=batch["labels"].device)
        # with one weight of 1 the mean is that teacher; on classes it is a distribution like any other
        return MixedTarget(tuple(parts), weights, "probabilities" if self.support == "classes" else "apart")

    def _shares(self, batch: Batch) -> "Iterator[_Share]":
        """Find each teacher's positions in a batch; those without any are passed over."""
        assert self.names, "check_routes comes first"
        for number, name in enumerate(self.names):
            own = (batch["route"] == number) & (batch["labels"] != IGNORE_INDEX)
            rows = own.any(1).nonzero()[:, 0]
            if len(rows):
                yield _Share(self.parts[name], rows, own)


class _Share(NamedTuple):
    """A teacher's part of a batch: its rows, `[R]`, and its positions, `[B, T]`."""

    teacher: Teacher
    rows: Tensor
    own: Tensor
