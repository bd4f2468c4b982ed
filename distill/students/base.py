"""What a student is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.tasks import Task
from distill.types import Batch, ConfigError

Batches = Callable[[], Iterable[Batch]]


class Student(ABC):
    """Makes the model to train. Its constructor holds names; weights are made or read in `build`."""

    name: str  # what the banner and the report call it

    batches: Batches | None = None  # where there are data
    attn_implementation: str | None = None  # that it asks for
    gradient_checkpointing: bool = False  # whether it keeps only the inputs of its layers

    def blueprint(self, task: Task, expected: dict[str, Any]) -> Any:
        """Give the configuration of transformers that the model will have, without reading weights or data: plans count by it.

        Args:
            task: what it is for.
            expected: what the data say of a new model, e.g. `vocab_size`.

        Raises:
            ConfigError: it cannot be read, or is known only when the weights are.
        """
        raise ConfigError(f"what {type(self).__name__} makes is known only when the weights are; use fit --dry-run instead")

    def wrapped(self, model: PreTrainedModel, task: Task) -> PreTrainedModel:
        """Put around a model what is trained in place of its weights; most students train these."""
        return model

    def calibrate_on(self, batches: Batches) -> None:
        """Take what gives training batches, the same each time and on every rank, for students that measure while they are built."""
        self.batches = batches

    @abstractmethod
    def build(self, task: Task, expected: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Make the model, in training mode.

        Args:
            task: what it is for.
            expected: what its config must say for these data, e.g. `vocab_size` or `num_labels`.
            tokenizer: the data's tokenizer, to compare with the model's own.
            dtype: of the parameters.
        """
