"""What one accumulation window gathers for the log and the balancer, and how it becomes figures of the global batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.balance.base import Measured
from distill.balance.branch import Branch
from distill.types import IGNORE_INDEX, Batch


class Micro(NamedTuple):
    """What a micro-batch gives: sums over its valid positions.

    Attributes:
        total: the weighted sum, differentiable.
        sums: each term's own, detached.
        squares: squared norms of the token losses' gradients, where they were measured.
        branches: where those of the other terms will be, after the backward pass.
        with_norms: whether they are measured.
        gram: inner products of the terms' gradients on the parameters, where they were measured.
    """

    total: Tensor
    sums: dict[str, Tensor]
    squares: dict[str, Tensor]
    branches: dict[str, Branch]
    with_norms: bool = False
    gram: Tensor | None = None


class Window:
    """The micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self.parts: list[Micro] = []
        self.ids: list[Tensor] = []
        self.valid: list[Tensor] = []
        self.count: Tensor = torch.ones(())

    def add(self, micro: Micro, batch: Batch, count: Tensor) -> None:
        """Take in a micro-batch; `count` is the valid positions of the global batch."""
        self.parts.append(micro._replace(total=micro.total.detach()))
        self.ids.append(batch["sample_ids"])
        self.valid.append((batch["labels"] != IGNORE_INDEX).sum())
        self.count = count

    def rows(self) -> list[int]:
        """The training rows of this rank."""
        return [i for part in self.ids for i in part.tolist()]

    def measured(self, names: list[str], reduce_sum: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], Measured]:
        """Give the means over the global batch, of the objective (`loss`) and of every term, and what the balancer learns.

        The branch points of different micro-batches and ranks are different activations, so their squared norms add up.

        Args:
            names: the terms.
            reduce_sum: sums a tensor over the ranks; called once, with everything in it.
        """
        losses = torch.stack([torch.stack([micro.total, *(micro.sums[name] for name in names)]) for micro in self.parts]).sum(0)
        with_norms = self.parts[0].with_norms
        squares = torch.stack([self._square(name).to(losses) for name in names]) if with_norms else losses.new_zeros(0)
        products = self.parts[0].gram
        exact = losses.new_zeros(0) if products is None else (products / self.valid[0].clamp(min=1) ** 2).flatten().to(losses)
        ones = losses.new_ones(1)
        together = [losses / self.count, squares / self.count**2, exact, ones]
        means, norms, exact, ranks = reduce_sum(torch.cat(together)).split([len(part) for part in together])
        by_name = dict(zip(names, means.tolist()[1:], strict=True))
        return {"loss": means[0].item(), **by_name}, Measured(
            losses=by_name,
            norms=dict(zip(names, norms.sqrt().tolist(), strict=True)) if with_norms else {},
            gram=None if products is None else (exact / ranks).double().view(len(names), len(names)).cpu(),
        )

    def _square(self, name: str) -> Tensor:
        found = [micro.branches[name].square if name in micro.branches else micro.squares[name] for micro in self.parts]
        return torch.stack([square.to(self.count.device) for square in found]).sum()
