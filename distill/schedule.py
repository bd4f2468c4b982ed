"""Schedules: a value as a function of the optimizer step, for temperatures and other knobs that move during training."""

import math
from abc import ABC, abstractmethod

from distill.types import ConfigError


class Schedule(ABC):
    """A value that depends on how far training has come."""

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """Give the value at optimizer step `step` of `total`, both counted from 0; steps past `total` keep the last value."""


class Constant(Schedule):
    """The same value at every step."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, step: int, total: int) -> float:
        """Give the value."""
        return self.value


class _Ramp(Schedule):
    def __init__(self, start: float, end: float, fraction: float = 1.0) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction must be in (0, 1], got {fraction}; it is the share of training after which `end` is reached")
        self.start, self.end, self.fraction = start, end, fraction

    def progress(self, step: int, total: int) -> float:
        return min(1.0, step / max(1.0, self.fraction * total))


class Linear(_Ramp):
    """From `start` to `end` in a straight line: `start + (end - start) p`, with `p = min(1, step / (fraction · total))`."""

    def __call__(self, step: int, total: int) -> float:
        """Give the value at this step."""
        return self.start + (self.end - self.start) * self.progress(step, total)


class Cosine(_Ramp):
    """From `start` to `end` along half a cosine: `end + (start - end)(1 + cos(π p)) / 2`, with `p` as in `Linear`."""

    def __call__(self, step: int, total: int) -> float:
        """Give the value at this step."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self.progress(step, total))) / 2


def as_schedule(value: float | Schedule) -> Schedule:
    """Wrap a plain number, so that a knob may be written either way."""
    return value if isinstance(value, Schedule) else Constant(float(value))
