"""The curves of a run, out of the lines of its `metrics.jsonl`: what a resume logged twice is counted once, long ones are thinned."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

POINTS = 400


class Series(NamedTuple):
    """One figure of the log.

    Attributes:
        steps: `[n]`, optimizer steps from 0, rising; after `thin` the mean step of a bin.
        values: `[n]`, may hold NaN and infinities.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def finite(self) -> "Series":
        """Without what is no number."""
        there = np.isfinite(self.values)
        return Series(self.steps[there], self.values[there])


def read(path: Path) -> list[dict[str, Any]]:
    """Read a log; a last line that a kill has torn is left out, and a log that is not there is empty."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def series(log: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Give every figure by its key.

    A run that goes on from a checkpoint logs some steps again: from the step that comes again, all that was there before belongs to
    training that was thrown away, and the later lines count.

    Args:
        log: of `JsonlLogger`; the strings "nan", "inf" and "-inf" are read as numbers.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in log:
        for key, value in line.items():
            if key in ("step", "time", "epoch"):
                continue
            steps, values = found.setdefault(key, ([], []))
            while steps and steps[-1] >= line["step"]:
                steps.pop()
                values.pop()
            steps.append(line["step"])
            values.append(float(value))
    return {key: Series(np.array(steps, float), np.array(values, float)) for key, (steps, values) in found.items()}


def restarts(log: Iterable[Mapping[str, Any]], key: str = "train/loss") -> int:
    """Count how often the steps of a figure go back: a run that went on exactly where its log ends is not seen."""
    steps = [line["step"] for line in log if key in line]
    return sum(later <= earlier for earlier, later in pairwise(steps))


def step_seconds(log: Sequence[Mapping[str, Any]], key: str = "train/loss") -> float | None:
    """Give the median seconds of an optimizer step, out of the times between two logs without a validation in between; None for none."""
    found = []
    for before, after in pairwise(log):
        if key in before and key in after and after["step"] > before["step"]:
            found.append((after["time"] - before["time"]) / (after["step"] - before["step"]))
    return float(np.median(found)) if found else None


def thin(curve: Series, points: int = POINTS) -> Series:
    """Keep at most so many points: the means, of steps and values, of bins of equally many neighbours, what is not finite left out."""
    curve = curve.finite
    n = len(curve.steps)
    if n <= points:
        return curve
    first = np.arange(points) * n // points
    size = np.diff(np.append(first, n))
    return Series(np.add.reduceat(curve.steps, first) / size, np.add.reduceat(curve.values, first) / size)


def as_lists(curve: Series, points: int = POINTS) -> list[list[float]]:
    """For `report.json`: thinned, six digits."""
    return [[_short(x) for x in part.tolist()] for part in thin(curve, points)]


def from_lists(lists: Sequence[Sequence[float]]) -> Series:
    """Take it back."""
    steps, values = lists
    return Series(np.array(steps, float), np.array(values, float))


def at(curve: Series, step: float) -> float:
    """The value at a step, straight between two that were logged; NaN where there is none."""
    return float(np.interp(step, curve.steps, curve.values)) if len(curve.steps) else math.nan


def _short(value: float) -> float:
    return float(f"{value:.6g}")
