"""Figures with their intervals, as `report.json` holds them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from distill.metrics.bootstrap import Interval
from distill.report.evidence import Bools, Floats, Ints
from distill.types import DataError


def interval(ask: Callable[[], Interval]) -> dict[str, Any]:
    """What the resampler says, or why it says nothing."""
    try:
        return dict(ask().as_dict())
    except DataError as error:
        return {"missing": str(error)}


def only(column: Floats | Ints | Bools, where: Bools) -> Floats:
    """The values of some positions; NaN, which a mean leaves out, at the others."""
    return np.where(where, column.astype(np.float64), np.nan)
