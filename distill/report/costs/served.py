"""How a model is asked where it is served: token ids and a mask in, logits of all positions out."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.types import Batch, MixedTarget, Outputs, Target

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """Give what a served model takes of a batch, int64 `[B, T]`; a packed row is served as one document."""
    ids = batch["input_ids"]
    given = {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}
    return given | {name: batch[name] for name in INPUTS[2:] if name in batch}


def all_outputs(target: Target) -> list[Outputs]:
    """The forward passes behind a target: one, or one a teacher of several; none where a target was not made by a model."""
    parts: tuple[Any, ...] = target.parts if isinstance(target, MixedTarget) else (target,)
    return [part for part in parts if isinstance(part, Outputs)]


def logits(outputs: Outputs) -> Tensor:
    """Project all positions: `[B, T, V]`, float32."""
    projected: Tensor = outputs.head(outputs.features)
    return projected.float()


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
