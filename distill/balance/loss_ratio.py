"""Weights from the values of the terms: no gradient is measured."""

import math

from distill.balance.base import Measured
from distill.balance.following import Shared, usable


class LossRatio(Shared):
    """Each weighted term has a given share of the objective's value: `w_i L_i / Σ_j w_j L_j = share_i`.

    `w_i ∝ share_i / L_i`, with Σ_i w_i the number of terms, smoothed as `Following` says. It costs nothing, and balances values where
    `GradNorm` balances gradients: a term with a large floor (the entropy in a cross-entropy) is held down for what no training takes
    away. Weights are 1 until the first step. A loss that is ≤ 0 or not finite leaves its term's weight as it was.

    Args:
        shares: share ≥ 0 of every term by the names under `model.losses`, on any common scale; None for equal ones, 0 for weight 0.
        smoothing: share of the old weight kept at each step, in [0, 1).
        min: smallest weight of a term with a share, > 0.
        max: largest weight.

    Raises:
        ConfigError: see `Shared`.
    """

    def __init__(self, shares: dict[str, float] | None = None, smoothing: float = 0.9, min: float = 1e-4, max: float = 1e4) -> None:
        super().__init__(shares, smoothing, min, max)

    def target(self, measured: Measured) -> dict[str, float]:
        """Divide the shares by the losses."""
        return {
            name: math.log(share) - math.log(measured.losses[name]) for name, share in self.active.items() if usable(measured.losses[name])
        }
