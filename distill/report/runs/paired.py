"""Whether one student is better than another, on the same held-out rows where there are such: differences with their intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from distill.metrics.bootstrap import Floats, Interval, Resampler
from distill.report.rows import Rows


class Measure(NamedTuple):
    """How a figure is read.

    Attributes:
        label: what it is called.
        more: whether more of it is better.
        scale: what it is multiplied by to be shown.
        unit: of a difference.
        digits: behind the point.
    """

    label: str
    more: bool
    scale: float
    unit: str
    digits: int


MEASURES = {
    "correct": Measure("accuracy", True, 100.0, "points", 1),
    "nll": Measure("loss", False, 1.0, "nats", 4),
    "kl": Measure("KL to its teacher", False, 1.0, "nats", 4),
    "agreement": Measure("agreement with its teacher", True, 100.0, "points", 1),
}


@dataclass(frozen=True)
class Student:
    """A student's rows.

    Attributes:
        rows: of its report.
        name: of it in there.
    """

    rows: Rows
    name: str

    @property
    def sums(self) -> Mapping[str, Floats]:
        """Its figures."""
        return self.rows.sums[self.name]


def resampler(rows: Rows, seed: int = 0) -> Resampler:
    """Of the rows that have a position."""
    return Resampler(np.arange(len(rows.count)), seed).at(np.flatnonzero(rows.count))


def mean(rows: Rows, figure: Floats, share: bool = False) -> Interval:
    """The mean over positions, with the interval that the run's own report has.

    Args:
        rows: R of them.
        figure: `[R]`, sums over the positions of each.
        share: whether it is one of shares, see `Resampler.share`.
    """
    there = rows.count > 0
    each = figure[there] / rows.count[there]
    if share and (each == each[0]).all():
        return resampler(rows).share(each)
    return resampler(rows).interval(*means(rows, figure))


def means(rows: Rows, figure: Floats, seed: int = 0) -> tuple[float, Floats]:
    """The mean over positions, and the same in every resample of the rows, `[resamples]`; NaN in one that holds no position."""
    there = rows.count > 0
    above, below = resampler(rows, seed).sums(np.stack([figure[there], rows.count[there]], axis=1)).T
    return float(figure.sum() / rows.count.sum()), np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def differences(a: Student, b: Student) -> dict[str, Interval]:
    """Give b − a of every figure that both have, with the 95 % interval of the bootstrap over rows.

    Paired where both were measured on the same rows: the same resamples for both. Else each has resamples of its own.

    Raises:
        DataError: one of them has one row alone.
    """
    seed = 0 if a.rows.digest == b.rows.digest else 1
    fewer = min(a.rows, b.rows, key=lambda rows: np.count_nonzero(rows.count))
    found = {}
    for figure in MEASURES:
        if figure in a.sums and figure in b.sums:
            (one, ones), (other, others) = means(a.rows, a.sums[figure]), means(b.rows, b.sums[figure], seed)
            found[figure] = resampler(fewer).interval(other - one, others - ones)
    return found


def mcnemar(a: Floats, b: Floats) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same samples.

    Of the n samples on which one alone is right, the number on which it is a has a binomial distribution with ½, if neither is better.

    Args:
        a: `[R]`, 1 where it is right and 0 where not.
        b: the same of the other.

    Returns:
        On how many samples a alone is right, on how many b alone is, and the two-sided p.

    Reference: McNemar, Psychometrika 12, 1947; exact after Edwards.
    """
    only_a, only_b = int(((a > 0) & (b == 0)).sum()), int(((b > 0) & (a == 0)).sum())
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def sentence(figure: str, difference: Interval, a: str, b: str) -> str:
    """Say a difference b − a, e.g. `B is better by 1.2 points (0.4 – 2.0)`."""
    m = MEASURES[figure]
    value, low, high = (m.scale * x for x in (difference.value, difference.low, difference.high))
    if low <= 0 <= high:
        signed = f"{value:+.{m.digits}f} {m.unit} ({low:+.{m.digits}f} – {high:+.{m.digits}f})"
        return f"no difference can be told: {signed.replace('-', '−')}"
    if value < 0:
        value, low, high = -value, -high, -low
    better = b if (difference.value > 0) == m.more else a
    return f"{better} is better by {value:.{m.digits}f} {m.unit} ({low:.{m.digits}f} – {high:.{m.digits}f})"
