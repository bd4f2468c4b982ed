"""Weights that do not move."""

import math
from collections.abc import Sequence

from distill.balance.base import Balancer
from distill.types import ConfigError


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

    def start(self, names: Sequence[str]) -> None:
        """Look for weights of no term."""
        if unknown := set(self.fixed) - set(names):
            raise ConfigError(f"balancer: weights for {sorted(unknown)}, but model.losses has {list(names)}")

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Give the fixed weights, 1 where none is set."""
        return {name: float(self.fixed.get(name, 1.0)) for name in names}
