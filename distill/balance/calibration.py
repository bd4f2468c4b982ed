"""Norms at the branch points, brought to the scale of norms on the parameters."""

import math
from dataclasses import replace

from distill.balance.base import Measured
from distill.balance.following import usable
from distill.types import ConfigError


class Calibration:
    """When norms are measured, and what they are multiplied by so that they can be compared with each other.

    A branch point is a different activation for each term, and how much a gradient grows on its way from there to the parameters differs
    between them, by a factor of ten or a hundred. So a norm measured there is multiplied by `exact_i / branch_i`, the ratio of both norms
    where both were last measured (each new ratio averaged, geometrically, with what was known); until then by 1.

    Args:
        every: optimizer steps between two measurements at the branch points, ≥ 1.
        exact_every: optimizer steps between two measurements on the parameters, 0 for never.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, every: int, exact_every: int) -> None:
        if every < 1 or exact_every < 0:
            raise ConfigError(f"model.balancer: want every ≥ 1 and exact_every ≥ 0 (0 for never), got {every} and {exact_every}")
        self.every, self.exact_every = every, exact_every
        self.ratios: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the norms at the branch points are to be measured: every `every` steps, and with every exact measurement."""
        return step % self.every == 0 or (self.exact_every > 0 and step % self.exact_every == 0)

    def correct(self, measured: Measured) -> Measured:
        """Learn the ratios, where both norms are known; give the norms multiplied by them."""
        if measured.gram is not None:
            exact = measured.gram.diagonal().sqrt().tolist()
            for (name, branch), value in zip(measured.norms.items(), exact, strict=bool(measured.norms)):
                if usable(value) and usable(branch):
                    self.ratios[name] = math.sqrt(value / branch * self.ratios.get(name, value / branch))
        return replace(measured, norms={name: norm * self.ratios.get(name, 1.0) for name, norm in measured.norms.items()})
