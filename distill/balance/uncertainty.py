"""Weights that are learned as the terms' uncertainties."""

import math
from collections.abc import Sequence
from typing import Any

from distill.balance.base import Balancer, Measured, want_several
from distill.types import ConfigError

LIMIT = 10.0  # |s| stays below, so that weights lie in [2.3e-5, 1.1e4] whatever the loss, also where s has no fixed point (L ≤ 0)


class Uncertainty(Balancer):
    """Homoscedastic uncertainty of each term, learned (Kendall, Gal, Cipolla 2018, arXiv 1705.07115, section 3.2, with s_i = log σ_i²).

    `L = Σ_i ½ exp(−s_i) L_i + ½ s_i`, so `w_i = ½ exp(−s_i)`, from s_i = 0: the paper's form for a regression, here for every term (for a
    cross-entropy the paper leaves out the first ½). After every optimizer step s_i takes a step of plain gradient descent on the mean loss
    of the global batch, `s_i ← s_i − lr (½ − ½ exp(−s_i) L_i)`. It is the gradient that learning s_i beside the student would give, at
    the same point; only the step differs, as the model's optimizer would put its own rule and learning rate in place of plain descent.
    In return s_i is the same on all ranks, and needs no place in the optimizer, its schedule or its weight decay. The fixed point is
    s_i = log L_i, that is `w_i = 1 / (2 L_i)`: in the long run the terms' values are equalised, as by `LossRatio`. |s_i| ≤ 10; a loss that
    is not finite leaves s_i as it was.

    Args:
        lr: step size in (0, 2); near the fixed point s_i comes closer by lr / 2 of the distance per step, above 2 it would overshoot.

    Raises:
        ConfigError: lr is out of range, or (when training starts) there are fewer than two terms.
    """

    def __init__(self, lr: float = 0.01) -> None:
        if not 0 < lr < 2:
            raise ConfigError(f"model.balancer.lr must be in (0, 2), got {lr}; 0.01 comes close in a few hundred steps")
        self.lr = lr
        self.s: dict[str, float] = {}

    def start(self, names: Sequence[str]) -> None:
        """Want several terms."""
        want_several(self, names)

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Give ½ exp(−s)."""
        return {name: 0.5 * math.exp(-self.s.get(name, 0.0)) for name in names}

    def update(self, measured: Measured) -> None:
        """Descend by one step."""
        for name, loss in measured.losses.items():
            s = self.s.get(name, 0.0)
            if math.isfinite(loss):
                s -= self.lr * (0.5 - 0.5 * math.exp(-s) * loss)
            self.s[name] = min(max(s, -LIMIT), LIMIT)

    def state_dict(self) -> dict[str, Any]:
        """Give s."""
        return {"s": dict(self.s)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.s = dict(state["s"])
