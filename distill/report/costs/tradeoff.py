"""Quality against what it costs, as a plot: one point a model, and the line of those that nothing else beats."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from distill.report.costs.pareto import front
from distill.report.page import plots

LABELLED = 8  # models; of more, only those on the front are named


class Point(NamedTuple):
    """A model.

    Attributes:
        name: of it.
        cost: less is better, > 0.
        quality: share in [0, 1], with its interval.
    """

    name: str
    cost: float
    quality: Mapping[str, float]


def on_front(points: Sequence[Point]) -> list[str]:
    """The names of the models that nothing else beats, the cheapest first."""
    on = front([p.cost for p in points], [p.quality["value"] for p in points])
    return [p.name for p, there in sorted(zip(points, on, strict=True), key=lambda pair: pair[0].cost) if there]


def draw(points: Sequence[Point], what: str, quality: str, looks: Mapping[str, plots.Style]) -> Figure:
    """Draw quality in percent against a cost.

    Args:
        points: at least one.
        what: the cost with its unit, for the axis.
        quality: what is measured, for the axis.
        looks: of each model.
    """
    figure, (axes,) = plots.new(4.4, 3.2)
    costs = np.array([p.cost for p in points])
    if costs.max() > 3 * costs.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    named = on_front(points)
    line = sorted((p for p in points if p.name in named), key=lambda p: p.cost)
    axes.step([p.cost for p in line], [100 * p.quality["value"] for p in line], where="post", color=plots.MUTED, linewidth=1, zorder=1)
    for p in points:
        value, look = 100 * p.quality["value"], looks[p.name]
        reach = [[value - 100 * p.quality["low"]], [100 * p.quality["high"] - value]]
        axes.errorbar(
            [p.cost], [value], np.maximum(reach, 0), color=look.color, marker=look.marker, markersize=7, elinewidth=1.2, capsize=2
        )
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel=what, ylabel=f"{quality}, %")
    chosen = [p for p in points if len(points) <= LABELLED or p.name in named]
    plots.label_points(axes, {p.name: (p.cost, 100 * p.quality["value"]) for p in chosen})
    return figure
