"""What one accumulation window gathers for the log and the balancer, and how it becomes figures of the global batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.balance.base import Measured
from distill.balance.branch import Branch
from distill.balance.gram import Gradients, gram
from distill.types import Batch


class Micro(NamedTuple):
    """What a micro-batch gives: sums over its valid positions.

    Attributes:
        total: the weighted sum, differentiable.
        sums: each term's own, detached.
        squares: squared norms of the token losses' gradients, where they were measured.
        branches: where those of the other terms will be, after the backward pass.
        with_norms: whether they are measured.
        gradients: of each term on the parameters, where they were measured; of this and the window's earlier ones together.
    """

    total: Tensor
    sums: dict[str, Tensor]
    squares: dict[str, Tensor]
    branches: dict[str, Branch]
    with_norms: bool = False
    gradients: list[Gradients] | None = None


class Window:
    """The micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self.parts: list[Micro] = []
        self.ids: list[Tensor] = []
        self.gradients: list[Gradients] | None = None
        self.count: Tensor = torch.ones(())

    def add(self, micro: Micro, batch: Batch, count: Tensor) -> None:
        """Take in a micro-batch; `count` is the valid positions of the global batch."""
        if micro.gradients is not None:
            self.gradients = micro.gradients
        self.parts.append(micro._replace(total=micro.total.detach(), gradients=None))
        self.ids.append(batch["sample_ids"])
        self.count = count

    def rows(self) -> list[int]:
        """The training rows of this rank: of the micro-batches whose loss is not finite, where there are any, else of all."""
        bad = [ids for micro, ids in zip(self.parts, self.ids, strict=True) if not micro.total.isfinite()]
        return [i for ids in bad or self.ids for i in ids.tolist()]

    def measured(self, names: list[str], reduce_sum: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], Measured]:
        """Give the means over the global batch, of the objective (`loss`) and of every term, and what the balancer learns.

        The branch points of different micro-batches and ranks are different activations, so their squared norms add up.

        Args:
            names: the terms.
            reduce_sum: sums a tensor over the ranks.
        """
        losses = torch.stack([torch.stack([micro.total, *(micro.sums[name] for name in names)]) for micro in self.parts]).sum(0)
        with_norms = self.parts[0].with_norms
        squares = torch.stack([self._square(name).to(losses) for name in names]) if with_norms else losses.new_zeros(0)
        together = [losses / self.count, squares / self.count**2]
        means, norms = reduce_sum(torch.cat(together)).split([len(part) for part in together])
        by_name = dict(zip(names, means.tolist()[1:], strict=True))
        return {"loss": means[0].item(), **by_name}, Measured(
            losses=by_name,
            norms=dict(zip(names, norms.sqrt().tolist(), strict=True)) if with_norms else {},
            gram=None if self.gradients is None else self._gram(self.gradients, reduce_sum),
        )

    def _gram(self, gradients: list[Gradients], reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
        whole = [[reduce_sum(part) for part in term] for term in gradients]
        return gram(whole) / float(self.count) ** 2

    def _square(self, name: str) -> Tensor:
        found = [micro.branches[name].square if name in micro.branches else micro.squares[name] for micro in self.parts]
        return torch.stack([square.to(self.count.device) for square in found]).sum()
