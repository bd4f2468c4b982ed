"""A switch by which a hidden state passes a transformer layer by, as if the layer were not there."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class PassBy(nn.Module):
    """What is in the layer: where it is off, the hidden state that enters also leaves.

    Args:
        owner: who made it, to find it again in a copy of the model.

    Attributes:
        kept: a bool of no dimension; true in the beginning.
    """

    kept: Tensor
    handle: RemovableHandle

    def __init__(self, owner: int = 0) -> None:
        super().__init__()
        self.owner = owner
        self.register_buffer("kept", torch.ones((), dtype=torch.bool))


def add(layer: nn.Module, owner: int = 0) -> PassBy:
    """Put a switch into a layer, as its submodule `pass_by`."""
    layer.add_module("pass_by", switch := PassBy(owner).to(next(layer.parameters()).device))
    switch.handle = layer.register_forward_hook(_pass_by, with_kwargs=True)
    return switch


def remove(layer: nn.Module) -> None:
    """Take the switch out; the layer counts again."""
    switch_of(layer).handle.remove()
    del layer.pass_by


def switch_of(layer: nn.Module) -> PassBy:
    """Find the switch of a layer that has one."""
    switch = layer.get_submodule("pass_by")
    assert isinstance(switch, PassBy)
    return switch


def _pass_by(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    # Reads the switch from the layer that runs, for a copy of the model has the hook of the original. All that was computed stays in the
    # graph, with a gradient of 0, for DDP waits for the gradient of every parameter
    hidden = args[0] if args else kwargs["hidden_states"]
    kept = switch_of(layer).kept
    if isinstance(output, tuple):
        return torch.where(kept, output[0], hidden), *output[1:]
    return torch.where(kept, output, hidden)
