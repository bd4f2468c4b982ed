"""What a balancer is: it turns the terms of the objective into one number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.types import ConfigError


@dataclass(frozen=True)
class Measured:
    """What was measured in an optimizer step, over the global batch and the same on every rank.

    Attributes:
        losses: each term, unweighted, the mean over valid positions.
        norms: the norm of each unweighted term's gradient (of that mean) at its branch point: the head's input for token losses, the
            taps for the others. Empty in a step where nobody asked.
        gram: `[k, k]`, float64: inner products of the unweighted terms' gradients on the student's parameters, in the terms' order; its
            diagonal holds the exact squared norms. None in a step where nobody asked.
    """

    losses: dict[str, float]
    norms: dict[str, float] = field(default_factory=dict)
    gram: Tensor | None = None


class Balancer(ABC):
    """Gives each term its weight w_i ≥ 0 in the objective `Σ_i w_i L_i`. What is measured in a step acts from the next one on.

    Attributes:
        exact_every: optimizer steps between two measurements of the gradients on the parameters, at one `autograd.grad` per term; 0: never.
    """

    exact_every: int = 0

    def start(self, names: Sequence[str]) -> None:  # noqa: B027  # most have nothing to do
        """Learn the terms' names, in order; called before the first step, and again with the same names after a restart.

        Raises:
            ConfigError: this balancer cannot work with these terms.
        """

    @abstractmethod
    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Give the current weight of every named term, finite and ≥ 0."""

    def wants_norms(self, step: int) -> bool:
        """Whether the norms at the branch points are to be measured in optimizer step `step`, counted from 0."""
        return False

    def wants_gram(self, step: int) -> bool:
        """Whether the gradients on the parameters are to be measured in optimizer step `step`."""
        return self.exact_every > 0 and step % self.exact_every == 0

    def update(self, measured: Measured) -> None:  # noqa: B027
        """Take in what an optimizer step measured; called after every one."""

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take it back."""


def want_several(balancer: Balancer, names: Sequence[str]) -> None:
    """Refuse to balance fewer than two terms.

    Raises:
        ConfigError: there is nothing to balance.
    """
    if len(names) < 2:
        raise ConfigError(
            f"model.balancer: {type(balancer).__name__} balances at least two terms against each other, but got {list(names)}; "
            "add a term to model.losses (or a share, where it is 0), or use FixedWeights"
        )
