"""What balancers have in common whose weights follow a target: an average over time, limits, and shares."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.balance.base import Balancer, Measured, want_several
from distill.types import ConfigError


def usable(value: float) -> bool:
    """Whether a measured norm or loss can be divided by: above 0 and finite."""
    return 0 < value < math.inf


class Following(Balancer):
    """Weights that follow a target which is measured anew, by an exponential moving average of their logarithms.

    `log w_i ← s log w_i + (1 − s) log w*_i`, then cut to `[min, max]`; the first target of a term is taken as it is. A weight is a
    ratio, so that half and double must count alike: in log space one batch with a tenfold norm moves the weight by as much as one with
    a tenth of it, whereas the plain average of the norms is ruled by the largest. What is averaged is the weight that was in force,
    after the cut, so that a target far outside does not have to be unlearned. A term whose target is unknown keeps its weight.

    Args:
        smoothing: s in [0, 1); 0 follows at once.
        min: smallest weight, > 0.
        max: largest weight.

    Raises:
        ConfigError: an argument is out of range, or (when training starts) there are fewer than two terms.
    """

    def __init__(self, smoothing: float, min: float, max: float) -> None:
        if not 0 <= smoothing < 1:
            raise ConfigError(f"model.balancer.smoothing must be in [0, 1), got {smoothing}; 0 follows every measurement at once")
        if not 0 < min <= max < math.inf:
            raise ConfigError(f"model.balancer: want 0 < min ≤ max, both finite, got min {min} and max {max}")
        self.smoothing, self.min, self.max = smoothing, min, max
        self.current: dict[str, float] = {}

    @abstractmethod
    def target(self, measured: Measured) -> dict[str, float]:
        """Give `log w*_i` of every term for which it is known, up to what `settled` takes out; all finite."""

    def settled(self, logs: dict[str, float]) -> dict[str, float]:
        """Shift the logarithms of weights to the sum that they shall have; here they stay."""
        return logs

    def start(self, names: Sequence[str]) -> None:
        """Want several terms."""
        want_several(self, names)

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Give the current weights, 1 for a term that was not measured yet."""
        return {name: self.current.get(name, 1.0) for name in names}

    def update(self, measured: Measured) -> None:
        """Move towards the target, where there is one."""
        if target := self.target(measured):
            moved = self.settled({name: self._moved(name, log) for name, log in self.settled(target).items()})
            cut = torch.tensor(list(moved.values()), dtype=torch.float64).exp().clamp(self.min, self.max)
            self.current.update(zip(moved, cut.tolist(), strict=True))

    def _moved(self, name: str, log: float) -> float:
        if name not in self.current:
            return log
        return self.smoothing * math.log(self.current[name]) + (1 - self.smoothing) * log

    def state_dict(self) -> dict[str, Any]:
        """Give the weights."""
        return {"current": dict(self.current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.current = dict(state["current"])


class Shared(Following):
    """Weights that follow shares, with `Σ_i w_i` = the number of terms that have one.

    A share of 0 is allowed and means weight 0: the term is logged and not trained on, and the others are weighed as if it were not
    there. The sum holds before the cut to `[min, max]`; what a cut takes or gives is not spread over the others. While a term keeps its
    weight because its measurement is unusable, the others share the rest of the sum.

    Args:
        shares: share ≥ 0 of every term by the names under `model.losses`, on any common scale; None for equal ones.
        smoothing: see `Following`.
        min: see `Following`.
        max: see `Following`.

    Raises:
        ConfigError: a share is negative or not finite, all are 0, or (when training starts) they name other terms than there are.
    """

    def __init__(self, shares: Mapping[str, float] | None, smoothing: float, min: float, max: float) -> None:
        super().__init__(smoothing, min, max)
        self.shares = None if shares is None else dict(shares)
        self.active: dict[str, float] = {}
        if bad := {name: share for name, share in (shares or {}).items() if not 0 <= share < math.inf}:
            raise ConfigError(f"model.balancer.shares: {bad} must be finite and ≥ 0")
        if shares is not None and not any(shares.values()):
            raise ConfigError(f"model.balancer.shares: {dict(shares)} gives no term a share > 0; leave shares out for equal ones")

    def start(self, names: Sequence[str]) -> None:
        """Hold the shares against the terms."""
        shares = dict.fromkeys(names, 1.0) if self.shares is None else self.shares
        if set(shares) != set(names):
            raise ConfigError(
                f"model.balancer.shares: unknown {sorted(set(shares) - set(names))}, missing {sorted(set(names) - set(shares))}; "
                f"give every term of model.losses a share, {list(names)}, 0 for one that is only logged"
            )
        self.active = {name: shares[name] for name in names if shares[name] > 0}
        want_several(self, list(self.active))

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Give the current weights, 0 where the share is 0."""
        return {name: 0.0 if self._share(name) == 0 else weight for name, weight in super().weights(names).items()}

    def _share(self, name: str) -> float:
        return 1.0 if self.shares is None else self.shares.get(name, 1.0)

    def settled(self, logs: dict[str, float]) -> dict[str, float]:
        """Shift them so that all active weights sum to their number."""
        held = sum(self.weights([name for name in self.active if name not in logs]).values())
        total = max(len(self.active) - held, self.min * len(logs))  # cuts may leave nothing to share, yet min each
        values = torch.log_softmax(torch.tensor(list(logs.values()), dtype=torch.float64), 0) + math.log(total)
        return dict(zip(logs, values.tolist(), strict=True))
