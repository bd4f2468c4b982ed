"""What a callback that compresses the student during training is."""

from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl
from transformers import PreTrainedModel

from distill.tasks import Task


class Compression(pl.Callback, ABC):
    """Changes what the student is while it is trained: its weights pass through a function, or parts of it are taken out.

    The student alone: the module hands it over, so that the teacher cannot be met. What a compression adds to the model are torch
    parametrizations (`torch.nn.utils.parametrize`) and hooks, so that masks are buffers and scores parameters of the student: they are
    in its checkpoint, and any strategy (DDP, ZeRO, FSDP2) treats them as it does weights. Several compressions take their turn in the
    order of `trainer.callbacks`.
    """

    @abstractmethod
    def prepare(self, student: PreTrainedModel, task: Task) -> None:
        """Add to a new student what is trained along; twice called with new students, it must add the same.

        It comes before any strategy, optimizer or checkpoint sees the model, and again on a second copy when a sharded student is saved.
        What starts later starts by a buffer's value, not by another module.

        Args:
            student: the model as it was made or loaded.
            task: what it is for.

        Raises:
            ConfigError: a pattern matches no module, or this model cannot be compressed so.
        """

    @abstractmethod
    def finish(self, student: PreTrainedModel) -> PreTrainedModel:
        """Give the model that is deployed: stock `from_pretrained` loads it, and its logits are those of the compressed one in `eval`.

        Args:
            student: a copy with all weights whole, on which `prepare` was called; may be changed.
        """

    def summary(self) -> list[str]:
        """Lines for the banner and the report: what is compressed, and how far it has come."""
        return []

    def figures(self) -> dict[str, Any]:
        """Figures for the report, e.g. the sparsity reached."""
        return {}
