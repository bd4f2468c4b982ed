"""The mean of several teachers."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from distill.teachers.base import Teacher
from distill.teachers.several import Several
from distill.types import Batch, ConfigError, MixedTarget, Outputs, SparseTarget, Support


class Ensemble(Several):
    """A weighted mean of teachers, each online, cached or served: `Σ_m w_m p_m`, or `p ∝ exp Σ_m w_m log p_m`, after softening by T.

    The mean of probabilities keeps what any teacher thinks possible; that of log-probabilities, what all do. A teacher whose target is the
    likeliest classes and a tail has no mean with another: then `Σ_m w_m KL(p_m ‖ q)` is minimised, which has the gradient of the mean, and
    only ForwardKL is right. So is it with random draws. Activations are those of the first teacher.

    Args:
        teachers: at least one.
        weights: w by the same order, ≥ 0, divided by their sum; None for equal ones.
        mean: of `probabilities` or `log_probabilities`; the latter wants teachers that know all classes.

    Raises:
        ConfigError: the weights are not so many numbers, or not of a positive sum.

    Reference:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 1 (either mean).
    """

    def __init__(
        self,
        teachers: list[Teacher],
        weights: list[float] | None = None,
        mean: Literal["probabilities", "log_probabilities"] = "probabilities",
    ) -> None:
        super().__init__({str(number): teacher for number, teacher in enumerate(teachers, start=1)})
        self.weights, self.mean = _shares([1.0] * len(teachers) if weights is None else weights, len(teachers)), mean
        self.name = " + ".join(f"{weight:.3g} × {teacher.name}" for weight, teacher in zip(self.weights, teachers, strict=True))

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Check each, and whether there is such a mean."""
        super().check(tokenizer, expected)
        for key, part in self.parts.items():
            if self.mean == "log_probabilities" and part.support != "classes":
                raise ConfigError(
                    f"model.teacher.mean is log_probabilities, which wants every teacher's probability of every class, but teacher {key} "
                    f"({part.name}) knows some; take probabilities, or teachers in memory"
                )

    @property
    def support(self) -> Support:
        """All classes where each knows them."""
        return "classes" if super().support == "classes" else "draws"

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> MixedTarget:
        """Ask each, the first for the activations too."""
        first, *others = self.teachers
        parts = [_plain(first, batch, taps), *(_plain(each, batch) for each in others)]
        apart = any(part.support == "bins" for part in self.teachers)
        return MixedTarget(tuple(parts), self._weights(parts[0]), "apart" if apart else self.mean, parts[0].taps)

    def _weights(self, target: Outputs | SparseTarget) -> Tensor:
        like = target.features if isinstance(target, Outputs) else target.probs
        return torch.tensor(self.weights, device=like.device).expand(*like.shape[:2], -1)


def _shares(weights: list[float], count: int) -> list[float]:
    if len(weights) != count:
        raise ConfigError(f"model.teacher.weights has {len(weights)} numbers for {count} teachers; give each one, or leave the key out")
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise ConfigError(f"model.teacher.weights must be ≥ 0, with a sum above 0, got {weights}")
    return [weight / sum(weights) for weight in weights]


def _plain(teacher: Teacher, batch: Batch, taps: Iterable[str] = ()) -> Outputs | SparseTarget:
    target = teacher(batch, taps)
    assert not isinstance(target, MixedTarget), "the constructor has refused such a teacher"
    return target
