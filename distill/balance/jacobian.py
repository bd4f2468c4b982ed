"""Weights from the inner products of the terms' gradients, by torchjd."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from distill.balance.base import Balancer, Measured, want_several
from distill.types import ConfigError


class JacobianAggregator(Balancer):
    """Jacobian descent: a common direction that no term objects to, chosen by torchjd from the Gramian of the terms' gradients.

    With J the `[k, n]` gradients of the k unweighted terms on the student's parameters and G = J Jᵀ, `w = weighting(G)`, and `wᵀ J` is
    what torchjd's aggregator of that name makes of J. Where no two gradients conflict, UPGrad and DualProj give 1/k each, which are also
    the weights before the first measurement: the objective is about the mean of the terms, not their sum.

    - UPGrad projects each gradient onto the cone of directions that lower every term, and takes the mean (Quinton and Rey 2024, Jacobian
      Descent for Multi-Objective Optimization, arXiv 2406.16232).
    - DualProj projects the mean of the gradients (Lopez-Paz and Ranzato 2017, GEM, arXiv 1706.08840).
    - MGDA takes the shortest convex combination (Désidéri 2012; Sener and Koltun 2018, arXiv 1810.04650): led by the smallest gradients.

    Only these: their weights are ≥ 0 by construction, while a negative weight of others (AlignedMTL, IMTLG) cannot be cut off without
    being another method, and those that draw random numbers (PCGrad) would part the ranks. Between two measurements the weights stand
    still. G is divided by its largest squared norm first, as the methods do not depend on its scale and torchjd takes a trace below 1e-4
    for 0. A term whose gradient is 0 or not finite keeps its weight, and the others are weighed among themselves.

    Args:
        weighting: which of torchjd's methods.
        every: optimizer steps between two measurements, ≥ 1; each costs one backward pass per term.

    Raises:
        ConfigError: torchjd is not installed, an argument is out of range, or (when training starts) there are fewer than two terms.
    """

    def __init__(self, weighting: Literal["UPGrad", "DualProj", "MGDA"] = "UPGrad", every: int = 10) -> None:
        if weighting not in ("UPGrad", "DualProj", "MGDA"):
            raise ConfigError(f"model.balancer.weighting must be UPGrad, DualProj or MGDA, got {weighting!r}")
        if every < 1:
            raise ConfigError(f"model.balancer.every must be at least 1, got {every}")
        try:
            self.weighting = getattr(import_module("torchjd.aggregation"), f"{weighting}Weighting")()
        except ImportError as error:  # also of the solver, which torchjd leaves optional
            raise ConfigError(
                f'model.balancer: JacobianAggregator needs torchjd; pip install "torchjd[quadprog_projector]" ({error})'
            ) from error
        self.exact_every = every
        self.names: list[str] = []
        self.current: dict[str, float] = {}

    def start(self, names: Sequence[str]) -> None:
        """Note the order of the terms."""
        want_several(self, names)
        self.names = list(names)

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Give the current weights, 1/k for a term that was not measured yet."""
        return {name: self.current.get(name, 1 / len(names)) for name in names}

    def update(self, measured: Measured) -> None:
        """Ask torchjd, in a step that measured the Gramian."""
        if measured.gram is None:
            return
        known = [i for i, square in enumerate(measured.gram.diagonal().tolist()) if 0 < square < float("inf")]
        gram = measured.gram[known][:, known].double().cpu()
        if known and gram.isfinite().all():
            self.current.update(zip([self.names[i] for i in known], self._solve(gram, len(self.names)), strict=True))

    def _solve(self, gram: Tensor, num_terms: int) -> list[float]:
        # Among k' terms weights are about 1/k', among all k about 1/k: the k' together have k'/k of what they would have alone
        weights = self.weighting(gram / gram.diagonal().max()) * (len(gram) / num_terms)
        return torch.as_tensor(weights).clamp(min=0).tolist()  # -1e-17 by rounding

    def state_dict(self) -> dict[str, Any]:
        """Give the weights."""
        return {"current": dict(self.current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.current = dict(state["current"])
