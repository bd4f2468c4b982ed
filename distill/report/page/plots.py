"""How plots look: the same everywhere, in light and dark, in print, and to the colour-blind."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import STEP_LOOKUP_MAP
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Colours as they are on white; `svg.py` writes them as variables of the page, and `style.css` gives each its look in light and dark.
# At least 3:1 against both backgrounds, and apart for every kind of colour vision: see tests/report/page/test_colors.py.
PALETTE = ("#0f5fbf", "#b84a0c", "#14967a", "#74105a", "#b28714", "#5f636e")
INK, PAPER = "#000000", "#ffffff"  # text and ground; a grey between them is a mix of them in both modes
MUTED, FAINT = "#666666", "#d9d9d9"

WIDEST = 4.8  # inches for one plot: a phone shows it at its own size, so that text of 9 pt is 9 pixels high


class Style(NamedTuple):
    """How a model is drawn: told apart by line and marker as well as by colour."""

    color: str
    linestyle: str
    marker: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Give each model of a report its look; the teacher and the final student have the same in every plot."""
    lines, markers = ["-", "--", "-.", ":"], "os^Dvx"
    return {name: Style(PALETTE[i % 6], lines[i % 4], markers[i % 6]) for i, name in enumerate(names)}


def new(width: float = WIDEST, height: float = 3.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure with its axes side by side, in inches; no global state is touched.

    A plot is at most `WIDEST` inches wide, for its text must be readable on a phone. There the axes of a figure with several columns stand
    one below the other, unless the figure has a title or a legend of its own.

    Args:
        width: of the figure.
        height: of the figure.
        columns: how many axes.
    """
    figure = Figure(figsize=(min(width, WIDEST * columns), height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for each in axes:
        _look(each)
    return figure, axes


def _look(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=9, length=3, color="#999999", labelcolor=INK)
    axes.grid(visible=True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_prop_cycle(color=PALETTE)


def curve(
    axes: Axes, x: ArrayLike, y: ArrayLike, style: Style, label: str, low: ArrayLike | None = None, high: ArrayLike | None = None
) -> None:
    """Draw a line, and the band of its interval where there is one.

    Args:
        axes: to draw on.
        x: `[N]`.
        y: `[N]`; a gap where it is NaN.
        style: of the model.
        label: for the legend.
        low: `[N]`, lower end of the interval.
        high: `[N]`, its upper end.
    """
    few = len(np.asarray(x)) <= 24
    axes.plot(
        x, y, color=style.color, linestyle=style.linestyle, marker=style.marker if few else "", markersize=5, linewidth=1.8, label=label
    )
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)


def legend(axes: Axes, columns: int = 2) -> None:
    """Put the names of the lines above the plot, where they hide nothing, and the plot's title above them; call it after both."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // columns)
    axes.set_title(axes.get_title("left"), loc="left", fontsize=10, pad=6 + 14 * rows)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0, "borderpad": 0.2, "labelspacing": 0.4}
    axes.legend(ncols=columns, frameon=False, fontsize=9, handlelength=2.6, columnspacing=1.4, **place)


def dots_with_intervals(axes: Axes, figures: Mapping[str, Any], looks: Mapping[str, Style] | None = None, text: Any = None) -> None:
    """Draw a figure and its interval a row, the first at the top; one that was not measured keeps its row, empty.

    Args:
        axes: to draw on; x is the figure's.
        figures: `{"value", "low", "high"}`, a bare number, None, or `{"missing": why}`, by the row's name.
        looks: of the rows; all the same where it is None.
        text: writes a value beside its dot, e.g. `words.percent`; nothing is written where it is None.
    """
    for row, (name, figure) in enumerate(figures.items()):
        look = looks[name] if looks else Style(PALETTE[0], "-", "o")
        ends = _ends(figure)
        if ends is None:
            continue
        value, low, high = ends
        axes.plot([low, high], [row, row], color=look.color, linewidth=2.2, solid_capstyle="butt")
        axes.plot([value], [row], color=look.color, marker=look.marker, markersize=7, linestyle="")
        if text:
            axes.annotate(text(value), (value, row), (0, 7), textcoords="offset points", ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.set_ylim(len(figures) - 0.5, -0.6)
    axes.margins(x=0.08)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _ends(figure: Any) -> tuple[float, float, float] | None:
    if isinstance(figure, Mapping):
        return None if "missing" in figure else (figure["value"], figure["low"], figure["high"])
    return None if figure is None else (figure, figure, figure)


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, where it covers no other name, point or line; call it last, for it asks where things are."""
    whole = axes.get_figure(root=True)
    assert whole is not None, "axes of `new`"
    whole.draw_without_rendering()
    inside = tuple(axes.get_window_extent().extents)
    taken: list[tuple[float, ...]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in axes.transData.transform(list(points.values()))]
    taken += [(x - 1, y - 1, x + 1, y + 1) for corners in _lines(axes) for x, y in _along(corners)]
    for name, point in points.items():
        words = [axes.annotate(name, point, xytext=at, textcoords="offset points", fontsize=9, **how) for at, how in _PLACES]
        boxes = [tuple(each.get_window_extent().extents) for each in words]
        covered = [sum(_overlap(box, other) for other in taken) + 4 * (_overlap(box, box) - _overlap(box, inside)) for box in boxes]
        chosen = covered.index(min(covered))
        taken.append(boxes[chosen])
        for each in words[:chosen] + words[chosen + 1 :]:
            each.remove()


def _lines(axes: Axes) -> Iterator[Floats]:
    """The corners of all lines and error bars, in pixels: each `[n, 2]`."""
    for line in axes.get_lines():
        stepped = STEP_LOOKUP_MAP[line.get_drawstyle()](*np.asarray(line.get_xydata()).T)
        yield line.get_transform().transform(np.column_stack(stepped))
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            yield from (bars.get_transform().transform(np.asarray(segment)) for segment in bars.get_segments())


def _along(corners: Floats) -> Floats:
    """Places on a line, dense enough that no word fits between them: `[n, 2]`."""
    corners = corners[np.isfinite(corners).all(axis=1)]
    if len(corners) < 2:
        return corners
    return np.concatenate([np.linspace(a, b, 2 + int(np.abs(b - a).max() / 4)) for a, b in itertools.pairwise(corners)])


_PLACES: Sequence[tuple[tuple[float, float], dict[str, Any]]] = [
    ((8, 0), {"ha": "left", "va": "center"}),
    ((0, 7), {"ha": "center", "va": "bottom"}),
    ((0, -7), {"ha": "center", "va": "top"}),
    ((-8, 0), {"ha": "right", "va": "center"}),
    ((7, 7), {"ha": "left", "va": "bottom"}),
    ((7, -7), {"ha": "left", "va": "top"}),
    ((-7, 7), {"ha": "right", "va": "bottom"}),
    ((-7, -7), {"ha": "right", "va": "top"}),
    ((0, 20), {"ha": "center", "va": "bottom"}),
    ((0, -20), {"ha": "center", "va": "top"}),
]


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
