"""One block of the chunked objective: every token loss on a few positions, and its gradient with respect to the student's logits.

The rows of a block are few enough to stay in a core's cache while the elementwise passes of all the terms go over them. Where every term
knows its gradient in closed form (`TokenLoss.with_gradient`) autograd, which cannot know what cancels in it, is not asked.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.losses.base import TokenLoss
from distill.losses.support import Distribution, cut
from distill.types import ConfigError


class Evaluated(NamedTuple):
    """What a block gives.

    Attributes:
        sums: `[K]`, each term summed over the positions, in nats.
        flows: gradients `[n, V]` with respect to the student's logits: of `Σ_i w_i L_i` alone, or of each L_i.
        params: gradients of `Σ_i w_i L_i` with respect to `Terms.params`.
    """

    sums: Tensor
    flows: list[Tensor]
    params: list[Tensor]


class Terms:
    """The token losses L_i of an objective by name, and their weights w_i.

    Attributes:
        params: what is trained of the losses themselves.
    """

    def __init__(self, losses: Mapping[str, TokenLoss], weights: Mapping[str, float], num_classes: int) -> None:
        self.losses, self.num_classes = dict(losses), num_classes
        self.weights = [weights[name] for name in losses]
        self.params = trainable(*losses.values())
        self.closed = all(has_closed_form(type(loss)) for loss in losses.values())

    def sums(self, logits: Tensor, teacher_logits: Tensor | None, labels_N: Tensor) -> Tensor:
        """Evaluate every term: `[K]`."""
        return torch.stack(self._summed(cut(logits, self.num_classes), teacher_logits, labels_N))

    def gradients(self, logits: Tensor, teacher_logits: Tensor | None, labels_N: Tensor, each: bool) -> Evaluated:
        """Evaluate every term and the gradient of the weighted sum, or of `each` term by itself."""
        student = cut(logits, self.num_classes).detach()
        return (self._closed if self.closed else self._by_autograd)(student, teacher_logits, labels_N, each)

    def _closed(self, student_logits: Tensor, teacher_logits: Tensor | None, labels_N: Tensor, each: bool) -> Evaluated:
        student, teacher = Distribution(student_logits), self._teacher(teacher_logits)
        sums: list[Tensor] = []
        flows: list[Tensor] = []
        for (name, loss), weight in zip(self.losses.items(), self.weights, strict=True):
            values, flow = loss.with_gradient(student, teacher, labels_N)  # type: ignore[arg-type]  # None where no loss wants one
            sums.append(_sum(name, values, labels_N))
            if each or not flows:
                flows.append(flow if each or weight == 1 else flow.mul_(weight))
            else:
                flows[0].add_(flow, alpha=weight)
        return Evaluated(torch.stack(sums), flows, [])

    def _by_autograd(self, student_logits: Tensor, teacher_logits: Tensor | None, labels_N: Tensor, each: bool) -> Evaluated:
        with torch.enable_grad():
            leaf = student_logits.requires_grad_()
            sums = self._summed(leaf, teacher_logits, labels_N)
            objective = torch.stack([weight * value for weight, value in zip(self.weights, sums, strict=True)]).sum()
        if each:
            flows, params = [_gradients(value, [leaf])[0] for value in sums], _gradients(objective, self.params)
        else:
            flow, *params = _gradients(objective, [leaf, *self.params])
            flows = [flow]
        return Evaluated(torch.stack(sums).detach(), flows, params)

    def _summed(self, student_logits: Tensor, teacher_logits: Tensor | None, labels_N: Tensor) -> list[Tensor]:
        student, teacher = Distribution(student_logits), self._teacher(teacher_logits)
        return [_sum(name, loss(student, teacher, labels_N), labels_N) for name, loss in self.losses.items()]

    def _teacher(self, logits: Tensor | None) -> Distribution | None:
        return None if logits is None else Distribution(cut(logits, self.num_classes))


def has_closed_form(cls: type[TokenLoss]) -> bool:
    """Whether `with_gradient` is of the same formula as `forward`: not where a subclass has changed the formula and kept the gradient."""
    for each in cls.__mro__:
        if "with_gradient" in vars(each):
            return each is not TokenLoss
        if "forward" in vars(each) or "divergence" in vars(each):
            return False
    return False


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that want a gradient, each once, whichever modules share it."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def _sum(name: str, values: Tensor, labels_N: Tensor) -> Tensor:
    if values.shape != labels_N.shape:
        raise ConfigError(
            f"model.losses.{name} gives shape {list(values.shape)} for {len(labels_N)} positions; it must give one value per position, "
            "[N], summed over the vocabulary and not averaged over positions"
        )
    return values.sum()


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not leaves:
        return []
    return list(torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True, allow_unused=True))
