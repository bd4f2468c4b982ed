"""Masks on weights, as parametrizations: they are state of the model, and any strategy treats them as it does its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from distill.compress.scores import displacement, magnitude
from distill.parallel.gather import whole


class Mask(nn.Module):
    """Gives `w · m`. The gradient of w is `g · m`: what is pruned gets none.

    It is still moved by the optimizer's momentum and weight decay, which shows where a later mask lets it in again.

    Args:
        weight: what it is for.
        shape: of m, to be broadcast to the weight's; None for the weight's own.
        owner: who made it, to find it again in a copy of the model.

    Attributes:
        mask: m, bool; all true in the beginning.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, shape: Sequence[int] | None = None, owner: int = 0) -> None:
        super().__init__()
        self.owner = owner
        self.register_buffer("mask", torch.ones(weight.shape if shape is None else shape, dtype=torch.bool, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Mask a weight `[out, in]`."""
        return weight * self.mask

    def score(self, weight: Tensor) -> Tensor:
        """What the mask itself knows of each weight's worth, `[out, in]`, float32, both whole."""
        return magnitude(weight)


class DisplacementMask(Mask):
    """A mask that remembers where the weight began.

    Attributes:
        initial: w₀, `[out, in]`.
    """

    initial: Tensor

    def __init__(self, weight: Tensor, shape: Sequence[int] | None = None, owner: int = 0) -> None:
        super().__init__(weight, shape, owner)
        self.register_buffer("initial", weight.detach().clone())

    def score(self, weight: Tensor) -> Tensor:
        """`|w − w₀|`."""
        return displacement(weight, self.initial)


class MovementMask(Mask):
    """A mask with scores that the optimizer learns; Sanh et al. 2020, arXiv 2005.07683.

    The gradient goes straight through the threshold: with g = ∂L/∂w′, that of w is `g · m`, that of S is `g · w`, everywhere.

    The parameter is `S / rate` with the gradient of S, which is as if the optimizer had `rate` times its learning rate for S, whatever
    optimizer it is. Where S is only compared with other scores, as for the largest v, that changes nothing: S begins at 0 and is not
    decayed, so all scores grow by the same factor. It is a vector, for matrices are decayed by optimizers that follow custom.

    Args:
        weight: what it is for.
        shape: of the mask.
        owner: who made it.
        rate: learning rate of S as a multiple of the optimizer's.

    Attributes:
        scores: S / rate, `[out · in]`.
    """

    def __init__(self, weight: Tensor, shape: Sequence[int] | None = None, owner: int = 0, rate: float = 1.0) -> None:
        super().__init__(weight, shape, owner)
        self.rate = rate
        self.scores = nn.Parameter(torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Mask a weight `[out, in]`."""
        return cast(Tensor, _StraightThrough.apply(weight, self.mask, self.scores))

    def score(self, weight: Tensor) -> Tensor:
        """S, `[out, in]`."""
        return self.rate * read(self.scores).float().view_as(weight)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor]:
        weight, mask = ctx.saved_tensors
        return gradients[0] * mask if ctx.needs_input_grad[0] else None, None, (gradients[0] * weight).flatten()


def parametrizations(module: nn.Linear) -> Any:
    """The chain of a linear's weight."""
    assert parametrize.is_parametrized(module, "weight")
    chains: Any = module.parametrizations
    return chains["weight"]


def mask_of(module: nn.Module, owner: int) -> Mask | None:
    """The mask that this owner has put on a linear's weight, or None."""
    if not (isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight")):
        return None
    return next((each for each in parametrizations(module) if isinstance(each, Mask) and each.owner == owner), None)


def masks_of(model: nn.Module, owner: int) -> dict[str, tuple[nn.Linear, Mask]]:
    """The linears that this owner has put a mask on, by dotted name, with their masks."""
    found = ((name, module, mask_of(module, owner)) for name, module in model.named_modules())
    return {name: (cast(nn.Linear, module), mask) for name, module, mask in found if mask is not None}


@contextmanager
def own_weight(module: nn.Linear, mask: Mask | None) -> Iterator[Tensor]:
    """Give a linear's weight without its mask, and hold it and the mask's scores whole; every rank must open it equally often."""
    weight: Any = parametrizations(module).original if parametrize.is_parametrized(module, "weight") else module.weight
    with whole([weight, *(mask.parameters() if mask is not None else ())]), torch.no_grad():
        yield read(weight)


def read(parameter: Tensor) -> Tensor:
    """Give a parameter whole, detached; of FSDP2's shards every rank must ask."""
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


def put(module: nn.Linear, mask: Mask) -> None:
    """Put a mask on a linear's weight, behind what is there already."""
    parametrize.register_parametrization(module, "weight", mask, unsafe=True)


def burn(module: nn.Linear, mask: Mask) -> None:
    """Write a mask's zeros into the weight and take the mask off; other parametrizations of the weight stay.

    Deep copies of the module are spoiled by it: torch has given all of them one class, and takes the weight's property off that.
    """
    chain = parametrizations(module)
    with torch.no_grad():
        chain.original.mul_(mask.mask)
    if len(chain) == 1:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    else:
        del chain[list(chain).index(mask)]
