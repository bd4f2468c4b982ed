"""Schedules: a value as a function of the optimizer step, for temperatures and other knobs that move during training."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from distill.types import ConfigError


class Schedule(ABC):
    """A value that depends on how far training has come.

    Attributes:
        with_t_squared: whether it may be the temperature of a term that is multiplied by T².
    """

    with_t_squared: ClassVar[bool] = True

    def prepare(self, batch_size: int) -> None:  # noqa: B027  # most need not know
        """Learn how many rows a global batch has; called before the first step."""

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


class BatchAwareTemperature(Schedule):
    """A temperature that follows the batch, `T = T_ref · (B / B_ref)^(−1/4)`, so that the gradient's variance stays what it was.

    Where T is large beside the spread of the logits, the gradient of a softened divergence is ∝ T⁻² (Hinton et al. 2015,
    arXiv 1503.02531, section 2.1), hence its variance over batches of B rows ∝ T⁻⁴ / B, and with T ∝ B^(−1/4) it does not change with B.
    That is without the factor T². With it the variance hardly depends on T, the rule means nothing, and is refused: it wants
    `t_squared: false`. Measured (`docs/experiments.md`): the slope of log variance over log T comes near −4 only where T is that large;
    for language models with sharp logits it is nearer −2.7 between T = 1 and 8, so the rule keeps the variance only in part.

    Args:
        reference: T_ref > 0, the temperature that was good at the reference batch.
        reference_batch: B_ref ≥ 1, rows of the global batch it was good at.

    Raises:
        ConfigError: either is out of range.
    """

    with_t_squared = False

    def __init__(self, reference: float, reference_batch: int) -> None:
        if not reference > 0 or reference_batch < 1:
            raise ConfigError(f"BatchAwareTemperature: want reference > 0 and reference_batch ≥ 1, got {reference} and {reference_batch}")
        self.reference, self.reference_batch = reference, reference_batch
        self.prepare(reference_batch)

    def prepare(self, batch_size: int) -> None:
        """Set T for the global batch."""
        self.value = self.reference * (batch_size / self.reference_batch) ** -0.25

    def __call__(self, step: int, total: int) -> float:
        """Give T."""
        return self.value


def as_schedule(value: float | Schedule) -> Schedule:
    """Wrap a plain number, so that a knob may be written either way."""
    return value if isinstance(value, Schedule) else Constant(float(value))
