"""Balancers turn the terms of the objective into one number."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

from distill.types import ConfigError


class Balancer(ABC):
    """Gives each term its weight in the objective `Σ_i w_i L_i`."""

    @abstractmethod
    def weights(self, names: Iterable[str]) -> dict[str, float]:
        """Give the weight of every named term, ≥ 0."""


class FixedWeights(Balancer):
    """The same weights throughout.

    Args:
        weights: w_i ≥ 0 by the names under `model.losses`; a term that is not named weighs 1.

    Raises:
        ConfigError: a weight is negative, or (when training starts) names no term.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.fixed = weights or {}
        for name, value in self.fixed.items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"balancer: the weight of '{name}' must be finite and ≥ 0, got {value}")

    def weights(self, names: Iterable[str]) -> dict[str, float]:
        """Give the fixed weights, 1 where none is set."""
        terms = list(names)
        if unknown := set(self.fixed) - set(terms):
            raise ConfigError(f"balancer: weights for {sorted(unknown)}, but model.losses has {terms}")
        return {name: float(self.fixed.get(name, 1.0)) for name in terms}
