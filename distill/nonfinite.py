"""Steps whose loss or gradient is not finite: skipped on all ranks alike, counted, and after too many in a row the end."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from distill.types import ConfigError, TrainingError


class NonFinite:
    """Counts skipped optimizer steps.

    Args:
        limit: how many in a row are skipped; one more ends training. 0 ends it at the first.

    Attributes:
        total: skipped since training began, resumes included.

    Raises:
        ConfigError: the limit is negative.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ConfigError(f"model.max_skipped_steps must be at least 0, got {limit}; 0 stops at the first loss that is not finite")
        self.limit, self.total, self.in_a_row = limit, 0, 0

    def check(self, step: int, figures: Mapping[str, float], rows: Callable[[], list[int]]) -> bool:
        """Look at a step's figures, which are the same on every rank, and say whether the step must be skipped.

        Args:
            step: the optimizer step.
            figures: losses and the gradient's norm, by name.
            rows: gives the training rows that this rank saw, in the micro-batches that went wrong where it can tell.

        Raises:
            TrainingError: too many in a row; names the figures and the rows of every rank.
        """
        bad = [f"{name} is {value}" for name, value in figures.items() if not abs(value) < float("inf")]
        if not bad:
            self.in_a_row = 0
            return False
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row > self.limit:
            often = f" for {self.in_a_row} steps in a row" if self.limit else ""
            raise TrainingError(
                f"step {step}: {', '.join(bad)}{often}; the weights are as the last good step left them. Training rows of this batch: "
                f"{_of_all_ranks(rows())}. Try a lower model.optimizer.lr, trainer.gradient_clip_val=1, or trainer.precision=32-true"
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Give the counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _of_all_ranks(rows: list[int]) -> str:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return str(rows)
    everyone: list[list[int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    return ", ".join(f"rank {rank}: {found}" for rank, found in enumerate(everyone))
