"""The student as it is served: from token ids and a mask to logits, nothing else."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.types import Batch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """Give what a served model takes of a batch, int64 `[B, T]`; a packed row is served as one document."""
    ids = batch["input_ids"]
    given = {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}
    return given | {name: batch[name] for name in INPUTS[2:] if name in batch}


def arrays_of(batch: Batch) -> dict[str, Any]:
    """The same as NumPy arrays, for runtimes that take these."""
    return {name: value.contiguous().numpy() for name, value in inputs_of(batch).items()}


class Served(nn.Module):
    """A model with positional inputs and logits as its only output, which is what exporters trace.

    Args:
        model: of transformers.
        names: of the inputs, in order.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        # an encoder takes no such argument
        self.fixed = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Give the logits, `[B, T, V]` or `[B, V]`."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed).logits
        return logits


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run a model as it is served; float32 logits."""
    inputs = inputs_of(batch)
    return Served(model, tuple(inputs))(*inputs.values()).float()
