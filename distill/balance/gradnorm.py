"""Weights from the norms of the terms' gradients."""

import math
from typing import Any

from distill.balance.base import Measured
from distill.balance.calibration import Calibration
from distill.balance.following import Following, Shared, usable
from distill.types import ConfigError


class GradNorm(Shared):
    """Each weighted term's gradient has a given share of the sum of their norms (Chen et al. 2018, GradNorm, arXiv 1711.02257, eq. 1).

    `w_i g_i / Σ_j w_j g_j = share_i r_i^α / Σ_j share_j r_j^α`, with g_i the norm of the unweighted term's gradient on the parameters (in
    the paper on those of the last shared layer), estimated at the branch point as `Calibration` says, and r_i the relative inverse rate,
    `(L_i / L_i(first)) / mean_j(L_j / L_j(first))`; its mean cancels. As in the paper, Σ_i w_i is the number of terms. The paper takes a
    gradient step on w per training step towards `w_i g_i = mean_j(w_j g_j) r_i^α`, which all terms can meet only where the r_i^α have
    mean 1, hence the division by their sum. It has a closed form, `w_i ∝ share_i r_i^α / g_i`, so here it is solved, and smoothed as
    `Following` says (for α = 0 the same as smoothing the norms in log space). Weights are 1 until the first measurement. A norm that is 0
    or not finite, with α > 0 also a loss that is ≤ 0 or not finite, leaves its term's weight as it was.

    Args:
        shares: see `Shared`.
        alpha: α ≥ 0; above 0, terms that have come down less than the others pull harder. Paper: 0.12 to 1.5.
        every: optimizer steps between two measurements of the norms.
        exact_every: optimizer steps between two measurements on all parameters, each at one backward pass, and the memory of one gradient,
            per term; 0 for never, which takes the norms at the branch points for what they are.
        smoothing: share of the old weight kept at each measurement, in [0, 1).
        min: smallest weight of a term with a share, > 0.
        max: largest weight.

    Raises:
        ConfigError: see `Shared`; or an argument is out of range.
    """

    def __init__(
        self,
        shares: dict[str, float] | None = None,
        alpha: float = 0.0,
        every: int = 10,
        exact_every: int = 200,
        smoothing: float = 0.8,
        min: float = 1e-4,
        max: float = 1e4,
    ) -> None:
        super().__init__(shares, smoothing, min, max)
        if not 0 <= alpha < math.inf:
            raise ConfigError(f"model.balancer.alpha must be finite and ≥ 0, got {alpha}; 0 keeps the shares as they are")
        self.alpha, self.exact_every, self.calibration = alpha, exact_every, Calibration(every, exact_every)
        self.first: dict[str, float] = {}

    def wants_norms(self, step: int) -> bool:
        """As `Calibration.due` says."""
        return self.calibration.due(step)

    def target(self, measured: Measured) -> dict[str, float]:
        """Solve for the weights."""
        known = [
            name for name in self.active if usable(measured.norms.get(name, 0.0)) and (self.alpha == 0 or usable(measured.losses[name]))
        ]
        return {
            name: math.log(self.active[name]) + self.alpha * self._log_rate(name, measured) - math.log(measured.norms[name])
            for name in known
        }

    def _log_rate(self, name: str, measured: Measured) -> float:
        return math.log(measured.losses[name]) - math.log(self.first[name]) if self.alpha else 0.0

    def update(self, measured: Measured) -> None:
        """Note each term's first usable loss, then move."""
        self.first = {name: loss for name, loss in measured.losses.items() if usable(loss)} | self.first
        super().update(self.calibration.correct(measured))

    def state_dict(self) -> dict[str, Any]:
        """Give the weights, the first losses and the ratios of the norms."""
        return super().state_dict() | {"first": dict(self.first), "ratios": dict(self.calibration.ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.first, self.calibration.ratios = dict(state["first"]), dict(state["ratios"])


class NormEqualisation(Following):
    """All weighted gradients have the same norm, and the norms the sum that they had unweighted.

    `w_i = mean_j(g_j) / g_i`, with g_i as in `GradNorm`, of which this is the case α = 0 with equal shares and another normalisation:
    `Σ_i w_i g_i = Σ_i g_i`, so that no learning rate or clipping norm need change, while the weights have no fixed sum. A norm that is
    0 or not finite leaves its term's weight as it was, and is not in the mean.

    Args:
        every: optimizer steps between two measurements of the norms.
        exact_every: optimizer steps between two measurements on all parameters, each at one backward pass, and the memory of one gradient,
            per term; 0 for never, which takes the norms at the branch points for what they are.
        smoothing: share of the old weight kept at each measurement, in [0, 1).
        min: smallest weight, > 0.
        max: largest weight.

    Raises:
        ConfigError: an argument is out of range, or (when training starts) there are fewer than two terms.
    """

    def __init__(self, every: int = 10, exact_every: int = 200, smoothing: float = 0.8, min: float = 1e-4, max: float = 1e4) -> None:
        super().__init__(smoothing, min, max)
        self.exact_every, self.calibration = exact_every, Calibration(every, exact_every)

    def wants_norms(self, step: int) -> bool:
        """As `Calibration.due` says."""
        return self.calibration.due(step)

    def target(self, measured: Measured) -> dict[str, float]:
        """Compare each norm with their mean."""
        norms = {name: norm for name, norm in measured.norms.items() if usable(norm)}
        return {name: math.log(sum(norms.values()) / len(norms)) - math.log(norm) for name, norm in norms.items()}

    def update(self, measured: Measured) -> None:
        """Move towards the target of the corrected norms."""
        super().update(self.calibration.correct(measured))

    def state_dict(self) -> dict[str, Any]:
        """Give the weights and the ratios of the norms."""
        return super().state_dict() | {"ratios": dict(self.calibration.ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.calibration.ratios = dict(state["ratios"])
