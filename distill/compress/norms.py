"""How large the inputs of linear layers are, over the valid positions of a batch of all ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.checks import evaluating
from distill.parallel.summed import summed
from distill.types import Batch


@torch.no_grad()
def input_norms(model: nn.Module, names: Sequence[str], batch: Batch, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Give `‖x_j‖₂` of each input feature j of each of these linears; every rank must call.

    Args:
        model: holds them; evaluated without dropout.
        names: dotted names.
        batch: what `run` runs the model on; positions where its `attention_mask` is 0 do not count.
        run: runs the model once on this batch.

    Returns:
        By name `[in]`, float32.
    """
    squares: dict[str, Tensor] = {}
    valid = batch["attention_mask"].bool() if "attention_mask" in batch else None
    handles = [model.get_submodule(name).register_forward_pre_hook(_adder(name, valid, squares)) for name in names]
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: summed(square).sqrt() for name, square in squares.items()}


def at(x: Tensor, valid: Tensor | None) -> Tensor:
    """Give the vectors `[N, D]` of the valid positions `[B, T]`; all of what has no positions, as a pooler's `[B, D]`."""
    return x[valid] if valid is not None and x.shape[:-1] == valid.shape else x.reshape(-1, x.shape[-1])


def _adder(name: str, valid: Tensor | None, squares: dict[str, Tensor]) -> Callable[[nn.Module, Any], None]:
    def add(_module: nn.Module, args: Any) -> None:
        square = at(args[0].detach(), valid).float().square().sum(0)
        squares[name] = squares[name] + square if name in squares else square

    return add
