"""Weights by class frequency, and the term that multiplies any other by them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses.base import Setting, TokenLoss
from distill.losses.support import Distribution
from distill.types import ConfigError


def frequency_power(counts_V: Tensor, gamma: float) -> Tensor:
    """Weights by a power of the frequency, `n_c^(−γ)`, up to a common factor.

    γ = 0 leaves all classes alike, 1 gives every class the same share of the loss, 1/2 is half way (in logarithms).

    Args:
        counts_V: `[V]`, n_c ≥ 1.
        gamma: γ ≥ 0.

    Returns:
        `[V]`, float64, in (0, 1].
    """
    return counts_V.double() ** -gamma


def effective_number(counts_V: Tensor, beta: float) -> Tensor:
    """Weights by the effective number of samples, `(1 − β) / (1 − β^n_c)`, up to a common factor.

    The n-th sample of a class adds only `β^(n−1)` to what is known of it: β = 0 leaves all classes alike, β → 1 gives `1 / n_c`.

    Args:
        counts_V: `[V]`, n_c ≥ 1.
        beta: β in [0, 1).

    Returns:
        `[V]`, float64, in (0, 1].

    Reference:
        Cui, Jia, Lin, Song, Belongie 2019, "Class-Balanced Loss Based on Effective Number of Samples", arXiv 1901.05555,
        proposition 1 and section 4.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return (1 - beta) / -torch.expm1(counts_V.double() * log_beta)


def mean_one(relative_V: Tensor, counts_V: Tensor, cap: float | None = None) -> Tensor:
    """Scale weights to a mean of 1 over the samples, none above the cap.

    `w_c = min(cap, s r_c)` with the one s for which `Σ_c n_c w_c / Σ_c n_c = 1`; what the cap takes from the rarest classes is thus given
    to all others in proportion. Solved, not iterated: the capped classes are the k with the largest r, so that
    `s = (Σ n − cap Σ_{capped} n) / Σ_{others} n r`, and k is the smallest for which no other class exceeds the cap. There is one for every
    cap ≥ 1, and at cap = 1 all weights are 1.

    Args:
        relative_V: `[V]`, r_c > 0.
        counts_V: `[V]`, n_c ≥ 0; a class with 0 has a weight, and no part in the mean.
        cap: at least 1; None for no cap.

    Returns:
        `[V]`, float64, in (0, cap].
    """
    relative, counts = relative_V.double(), counts_V.double()
    if cap is None:
        return relative * counts.sum() / (counts * relative).sum()
    order = relative.argsort(descending=True)
    r, n = relative[order], counts[order]
    others = (n * r).flip(0).cumsum(0).flip(0)  # Σ n r from k on
    scale = (n.sum() - cap * (n.cumsum(0) - n)) / others
    k = int((scale * r <= cap * (1 + 1e-12)).nonzero()[0])
    return (scale[k] * relative).clamp(max=cap)


def occurrences(setting: Setting) -> Tensor:
    """How often each class is a label; in a vocabulary a token that never occurs counts as if it had occurred once.

    Returns:
        `[V]`, whole numbers, at least 1.

    Raises:
        ConfigError: one of the classes of a classifier never occurs.
    """
    counts = setting.class_counts()
    never = (counts == 0).nonzero().flatten().tolist()
    if never and setting.unit == "sample":
        names = ", ".join(f"'{setting.class_name(c)}'" for c in never[:5]) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
        raise ConfigError(
            f"{setting.key} needs the frequency of every class, but no training row has the label {names}; add rows with it, "
            "remove it from data.labels, or take a term without class frequencies"
        )
    return counts.clamp(min=1)


class PerClass(nn.Module):
    """One number per class: moved with its owner, but in no checkpoint, and in float64 whatever the models are cast to."""

    values_V: Tensor  # noqa: N815

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values_V", torch.empty(0), persistent=False)

    def set(self, values_V: Tensor) -> None:
        """Take values, to where the owner already is."""
        self.values_V = values_V.to(self.values_V.device)

    def like(self, tensor: Tensor) -> Tensor:
        """Give all values, `[V]`, in the dtype of a tensor."""
        return self.values_V.to(tensor.dtype)

    def at(self, labels_N: Tensor, like: Tensor) -> Tensor:
        """Give the values of some classes, `[N]`, in the dtype of a tensor."""
        return self.values_V[labels_N].to(like.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        exact = self.values_V
        super()._apply(fn, recurse)
        self.values_V = exact.to(self.values_V.device)  # a model cast to bfloat16 would have weights of three digits
        return self


class ClassWeights(ABC):
    """A weight per class from how often it occurs; 1 on average over the samples, see `mean_one`.

    Args:
        cap: the largest weight, at least 1; None for no cap.

    Raises:
        ConfigError: the cap is below 1, which a mean of 1 cannot stay under.
    """

    def __init__(self, cap: float | None = 10.0) -> None:
        if cap is not None and not cap >= 1:
            raise ConfigError(f"{type(self).__name__}: cap must be at least 1, the mean of the weights, got {cap}; use null for none")
        self.cap = cap

    @abstractmethod
    def relative(self, counts_V: Tensor) -> Tensor:
        """Give weights up to a common factor, `[V]`, for counts of at least 1."""

    def of(self, setting: Setting) -> Tensor:
        """Give the weights, `[V]` in float64; a token that never occurs has the weight of one that occurs once.

        Raises:
            ConfigError: a class of a classifier never occurs.
        """
        return mean_one(self.relative(occurrences(setting)), setting.class_counts(), self.cap)


class FrequencyPower(ClassWeights):
    """`w_c ∝ n_c^(−γ)`, see `frequency_power`.

    Args:
        gamma: γ ≥ 0.
        cap: see `ClassWeights`.

    Raises:
        ConfigError: γ is negative.
    """

    def __init__(self, gamma: float = 1.0, cap: float | None = 10.0) -> None:
        super().__init__(cap)
        if not 0 <= gamma < float("inf"):
            raise ConfigError(f"FrequencyPower: gamma must be at least 0, got {gamma}; 0 weighs all classes alike, 1 balances them")
        self.gamma = gamma

    def relative(self, counts_V: Tensor) -> Tensor:
        """Evaluate `frequency_power`."""
        return frequency_power(counts_V, self.gamma)


class EffectiveNumber(ClassWeights):
    """`w_c ∝ (1 − β) / (1 − β^n_c)`, see `effective_number`.

    Args:
        beta: β in [0, 1); `1 − 1/β'` for classes that are known after about β' samples.
        cap: see `ClassWeights`.

    Raises:
        ConfigError: β is out of range.
    """

    def __init__(self, beta: float = 0.999, cap: float | None = 10.0) -> None:
        super().__init__(cap)
        if not 0 <= beta < 1:
            raise ConfigError(
                f"EffectiveNumber: beta must be in [0, 1), got {beta}; 0 weighs all classes alike, 0.9999 nearly balances them"
            )
        self.beta = beta

    def relative(self, counts_V: Tensor) -> Tensor:
        """Evaluate `effective_number`."""
        return effective_number(counts_V, self.beta)


class ClassWeighted(TokenLoss):
    """Another term, at each position multiplied by the weight of the true class: `w_y L(n)`.

    Put on the distillation term, the hard term or both. Weights are 1 on average over the training data, so the balance between the
    terms stays about what it was.

    Args:
        term: the term.
        class_weights: how the weights follow from the counts of the classes.
    """

    def __init__(self, term: TokenLoss, class_weights: ClassWeights) -> None:
        super().__init__()
        self.term, self.class_weights, self.w = term, class_weights, PerClass()
        self.needs_teacher, self.regulariser, self.supports = term.needs_teacher, term.regulariser, term.supports

    def prepare(self, setting: Setting) -> None:
        """Count the classes, and prepare the term."""
        self.term.prepare(setting)
        self.w.set(self.class_weights.of(setting))

    def at(self, step: int, total: int) -> None:
        """Move the term's schedules."""
        self.term.at(step, total)

    def scheduled(self) -> dict[str, float]:
        """Give the term's."""
        return self.term.scheduled()

    def summary(self) -> list[str]:
        """Give the range of the weights, and what the term says."""
        w, cap = self.w.values_V, self.class_weights.cap
        capped = 0 if cap is None else int((w >= cap).sum())
        return [f"class weights {w.min():.3g} to {w.max():.3g}, {capped} of {len(w):,} at the cap", *self.term.summary()]

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate the term, and weigh it."""
        value: Tensor = self.term(student, teacher, labels_N)
        return value * self.w.at(labels_N, value)
