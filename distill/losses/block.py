"""One block of the chunked objective: every token loss on a few positions, and its gradient with respect to the student's logits.

The rows of a block are few enough to stay in a core's cache while the elementwise passes of all the terms go over them. Where every term
knows its gradient in closed form (`TokenLoss.with_gradient`) autograd, which cannot know what cancels in it, is not asked.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.losses.base import AlongProbs, TokenLoss
from distill.losses.support import Apart, Distribution, Side, cut
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

    def sums(self, logits: Tensor, teacher: Side | None, labels_N: Tensor) -> Tensor:
        """Evaluate every term: `[K]`."""
        return torch.stack(self._summed(cut(logits, self.num_classes), teacher, labels_N))

    def gradients(self, logits: Tensor, teacher: Side | None, labels_N: Tensor, each: bool) -> Evaluated:
        """Evaluate every term and the gradient of the weighted sum, or of `each` term by itself."""
        student = cut(logits, self.num_classes).detach()
        return (self._closed if self.closed else self._by_autograd)(student, teacher, labels_N, each)

    def _closed(self, student_logits: Tensor, teacher: Side | None, labels_N: Tensor, each: bool) -> Evaluated:
        student = Distribution(student_logits)
        sums: list[Tensor] = []
        flows: list[Tensor] = []
        along: dict[float, list[tuple[float, AlongProbs]]] = {}  # by temperature
        for (name, loss), weight in zip(self.losses.items(), self.weights, strict=True):
            part = None if each else _along_probs(loss, student, teacher, labels_N)
            if part is not None:
                sums.append(_sum(name, part.values, labels_N))
                along.setdefault(part.temperature, []).append((weight, part))
                continue
            values, flow = _with_gradient(loss, student, teacher, labels_N)
            sums.append(_sum(name, values, labels_N))
            if each or not flows:
                flows.append(flow if each or weight == 1 else flow.mul_(weight))
            else:
                flows[0].add_(flow, alpha=weight)
        for temperature, parts in along.items():
            flow = _together(student.probs(temperature), parts)
            flows = [flow if not flows else flows[0].add_(flow)]
        return Evaluated(torch.stack(sums), flows, [])

    def _by_autograd(self, student_logits: Tensor, teacher: Side | None, labels_N: Tensor, each: bool) -> Evaluated:
        with torch.enable_grad():
            leaf = student_logits.requires_grad_()
            sums = self._summed(leaf, teacher, labels_N)
            objective = torch.stack([weight * value for weight, value in zip(self.weights, sums, strict=True)]).sum()
        if each:
            flows, params = [_gradients(value, [leaf])[0] for value in sums], _gradients(objective, self.params)
        else:
            flow, *params = _gradients(objective, [leaf, *self.params])
            flows = [flow]
        return Evaluated(torch.stack(sums).detach(), flows, params)

    def _summed(self, student_logits: Tensor, teacher: Side | None, labels_N: Tensor) -> list[Tensor]:
        student = Distribution(student_logits)
        return [_sum(name, _values(loss, student, teacher, labels_N), labels_N) for name, loss in self.losses.items()]


# A term sees both sides on one support: that of the target. Terms without a teacher see all classes.


def _values(loss: TokenLoss, student: Distribution, teacher: Side | None, labels_N: Tensor) -> Tensor:
    if teacher is None or not loss.needs_teacher:
        value: Tensor = loss(student, None, labels_N)
        return value
    if isinstance(teacher, Apart):
        weighed = zip(teacher.parts, teacher.weights.unbind(-1), strict=True)
        return torch.stack([_values(loss, student, part, labels_N) * w for part, w in weighed]).sum(0)
    value = loss(teacher.align(student), teacher, labels_N)
    return value


def _with_gradient(loss: TokenLoss, student: Distribution, teacher: Side | None, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    if teacher is None or not loss.needs_teacher:
        return loss.with_gradient(student, None, labels_N)  # type: ignore[arg-type]  # None where no loss wants one
    if isinstance(teacher, Apart):
        weighed = zip(teacher.parts, teacher.weights.unbind(-1), strict=True)
        found = [(w, *_with_gradient(loss, student, part, labels_N)) for part, w in weighed]
        flows = [flow.mul_(w[:, None]) for w, _, flow in found]
        return torch.stack([value * w for w, value, _ in found]).sum(0), torch.stack(flows).sum(0)
    return loss.with_gradient(teacher.align(student), teacher, labels_N)  # type: ignore[arg-type]  # of the kinds that it supports


def _along_probs(loss: TokenLoss, student: Distribution, teacher: Side | None, labels_N: Tensor) -> AlongProbs | None:
    if not has_closed_form(type(loss), "along_probs"):
        return None
    return loss.along_probs(student, teacher if loss.needs_teacher else None, labels_N)


def _together(probs_NV: Tensor, parts: list[tuple[float, AlongProbs]]) -> Tensor:
    """The gradient of the weighted sum of terms of one temperature, in the place of the probabilities, which are not needed any more."""
    factor = sum(weight * part.factor for weight, part in parts)
    if isinstance(factor, Tensor):
        probs_NV.mul_(factor[:, None])
    elif factor != 1:
        probs_NV.mul_(factor)
    for weight, part in parts:
        probs_NV.scatter_add_(-1, part.ids, (-weight * part.amounts).to(probs_NV.dtype))
    return probs_NV


def has_closed_form(cls: type[TokenLoss], method: str = "with_gradient") -> bool:
    """Whether a method that gives the gradient is of the formula in use: not where a subclass changed that, or `with_gradient` alone."""
    for each in cls.__mro__:
        if method in vars(each):
            return each is not TokenLoss
        if {"forward", "divergence", "with_gradient"} & vars(each).keys():
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
