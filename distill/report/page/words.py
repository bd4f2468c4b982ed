"""Figures as text."""

import math
from collections.abc import Callable, Mapping
from typing import Any


def percent(figure: Any, digits: int = 1) -> str:
    """A share with its interval: `86.3 % (85.1 – 87.4)`; a share alone: `86.3 %`; nothing for what was not measured."""
    return _with_interval(figure, lambda x: f"{100 * x:.{digits}f}", " %")


def number(figure: Any, digits: int = 3, unit: str = "") -> str:
    """A number with its interval: `0.231 nats (0.225 – 0.238)`."""
    return _with_interval(figure, lambda x: f"{x:.{digits}f}", f" {unit}" if unit else "")


def count(figure: Any) -> str:
    """How many: `34,251`, `2.02 M`, `7.62 B`; whole numbers up to a million."""
    return "" if _unknown(figure) else f"{figure:,.0f}" if abs(figure) < 999_999.5 else _scaled(figure, {1e12: "T", 1e9: "B", 1e6: "M"})


def size(figure: Any) -> str:
    """Bytes, in thousands as disks are sold: `918 kB`, `8.07 MB`, `1.42 GB`."""
    return "" if _unknown(figure) else _scaled(figure, {1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "kB", 1: "B"})


def duration(figure: Any) -> str:
    """Seconds, in the unit that suits: `31 µs`, `4.2 ms`, `75.7 s`, `12 min 30 s`, `3 h 05 min`."""
    if _unknown(figure):
        return ""
    if figure < 59.95:
        return _scaled(figure, {1: "s", 1e-3: "ms", 1e-6: "µs"})
    minutes, seconds = divmod(round(figure), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(figure / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def milliseconds(figure: Any) -> str:
    """A time given in milliseconds, in the unit that suits: `4.2 ms`."""
    return "" if _unknown(figure) else duration(figure / 1000)


def ratio(figure: Any) -> str:
    """How many times, with its interval where it has one: `8.8×`."""
    return _with_interval(figure, lambda x: _digits(x, 2), "×")


def _with_interval(figure: Any, text: Callable[[float], str], unit: str) -> str:
    if _unknown(figure):
        return ""
    if isinstance(figure, Mapping):
        return _minus(f"{text(figure['value'])}{unit} ({text(figure['low'])} – {text(figure['high'])})")
    return _minus(f"{text(figure)}{unit}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _unknown(figure: Any) -> bool:
    if isinstance(figure, Mapping):
        return "missing" in figure or math.isnan(figure["value"])
    return figure is None or math.isnan(figure)


def _scaled(figure: float, units: Mapping[float, str]) -> str:
    """In the largest unit of which there is at least one, with three digits."""
    for scale, unit in units.items():
        if float(_digits(abs(figure) / scale).replace(",", "")) >= 1:
            return f"{_digits(figure / scale)} {unit}"
    scale, unit = list(units.items())[-1]
    return f"{_digits(figure / scale)} {unit}"


def _digits(figure: float, digits: int = 3) -> str:
    """Three digits that count, none of them after the point for a hundred and more: `0.0123`, `8.07`, `75.7`, `919`, `1,240`."""
    exponent = int(f"{figure:.{digits - 1}e}".partition("e")[2])  # of the rounded figure: 0.9996 is 1.00
    return f"{figure:,.{max(0, digits - 1 - exponent)}f}" if figure else "0"
