"""A figure of matplotlib as inline SVG: text as text, in the page's own colours, with names that are unique on the page."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from distill.report.page.blocks import Picture
from distill.report.page.plots import MUTED, PALETTE

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"
PIXELS_PER_INCH = 105  # on a wide page: text of 9 pt is 13 pixels high

_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_FAMILY = re.compile(r"font-family: [^;]*;?\s*")
_FONT = re.compile(r"font: ([^;']*?\d[\d.]*px) [^;]*")
_UPRIGHT = re.compile(r"rotate\(-0 [^)]*\)")
_MODEL = re.compile(r"var\(--plot-\d\)")
_URL = re.compile(r"url\(#([^)]+)\)")


class Drawings:
    """Draws the pictures of one page."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def of(self, picture: Picture) -> list[Markup]:
        """One SVG for each plot of a picture."""
        figures = picture.figure if isinstance(picture.figure, Sequence) else [picture.figure]
        shown = [root for figure in figures for root in _plots(figure)]
        many = len(shown) > 1
        alts = [f"{picture.alt} (Plot {i} of {len(shown)}.)" if many else picture.alt for i in range(1, len(shown) + 1)]
        return [Markup(_finished(root, f"plot{next(self._numbers)}", alt)) for root, alt in zip(shown, alts, strict=True)]


def _plots(figure: Figure) -> list[ElementTree.Element]:
    """A figure's columns, one by one, so that a phone can show them one below the other; the whole where it cannot be taken apart."""
    heads = _heads(figure)
    if len(heads) < 2 or figure.texts or figure.legends or figure.get_suptitle():
        return [_drawn(figure, None)]
    figure.draw_without_rendering()  # the layout of all of them is made, and stays
    layout = figure.get_layout_engine()
    figure.set_layout_engine("none")
    try:
        return [_column(figure, head, heads) for head in heads]
    finally:
        figure.set_layout_engine(layout)


def _heads(figure: Figure) -> list[Axes]:
    """The first axes of every column, from the left."""
    found: dict[int, Axes] = {}
    for axes in figure.axes:
        grid = axes.get_subplotspec()
        if grid is not None:
            found.setdefault(grid.colspan.start, axes)
    return [found[start] for start in sorted(found)]


def _column(figure: Figure, head: Axes, heads: list[Axes]) -> ElementTree.Element:
    """One column, with the axes that are nearest to it: a colour bar stands beside the plot that it is of."""
    mine = [axes for axes in figure.axes if min(heads, key=lambda one: abs(_center(one) - _center(axes))) is head]
    box = Bbox.union([box for axes in mine if (box := axes.get_tightbbox()) is not None]).padded(4)
    box = Bbox.from_extents(box.x0, 0, box.x1, figure.bbox.height)
    with _hidden([axes for axes in figure.axes if axes not in mine]):
        return _drawn(figure, box.transformed(figure.dpi_scale_trans.inverted()))


def _center(axes: Axes) -> float:
    return float(axes.get_window_extent().x0 + axes.get_window_extent().x1) / 2


@contextmanager
def _hidden(axes: list[Axes]) -> Iterator[None]:
    seen = [each for each in axes if each.get_visible()]
    for each in seen:
        each.set_visible(False)
    try:
        yield
    finally:
        for each in seen:
            each.set_visible(True)


def _drawn(figure: Figure, box: Bbox | None) -> ElementTree.Element:
    stream = BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distill", "savefig.bbox": None}):
        figure.savefig(stream, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None})
    return ElementTree.fromstring(stream.getvalue())


def _finished(root: ElementTree.Element, name: str, alt: str) -> str:
    """Rid of what a page has no use for; colours, fonts and names made the page's own."""
    _drop(root, {f"{SVG}metadata", f"{SVG}style"})
    _rename(root, name)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _tidy(key, value))
        if _UPRIGHT.fullmatch(element.get("transform", "")):
            del element.attrib["transform"]
        if element.tag == f"{SVG}text":  # a colour that is strong enough for a line is too weak for words
            element.set("style", _MODEL.sub(r"color-mix(in srgb, \g<0> 60%, var(--ink))", element.get("style", "")))
    width = float(root.get("viewBox", "0 0 1 1").split()[2])
    root.attrib = {"viewBox": root.get("viewBox", ""), "class": "plot", "role": "img", "aria-labelledby": f"{name}-alt"}
    root.set("style", f"width: {width / 72 * PIXELS_PER_INCH:.0f}px")
    words = ElementTree.Element(f"{SVG}desc", {"id": f"{name}-alt"})  # not `title`: it would pop up over the plot
    words.text = alt
    root.insert(0, words)
    ElementTree.register_namespace("", SVG[1:-1])
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r">\s+<", "><", text)


def _drop(root: ElementTree.Element, tags: set[str]) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in tags:
                parent.remove(child)


def _rename(root: ElementTree.Element, name: str) -> None:
    """Give what is referred to a name of this plot's own, and take all other names away."""
    used = set()
    for element in root.iter():
        link = element.attrib.pop(f"{XLINK}href", None)
        if link is not None:
            element.set("href", link)
            if link.startswith("#"):
                used.add(link[1:])
                element.set("href", f"#{name}-{link[1:]}")
        for key, value in element.attrib.items():
            used.update(_URL.findall(value))
            element.set(key, _URL.sub(rf"url(#{name}-\1)", value))
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in used:
            element.set("id", f"{name}-{old}")


def _tidy(key: str, value: str) -> str:
    if key in {"d", "x", "y"}:
        return _LONG.sub(lambda number: f"{float(number[0]):.2f}", " ".join(value.split()))
    if key in {"style", "fill", "stroke"}:
        value = _FONT.sub(r"font-size: \1", _FAMILY.sub("", value))
        return _COLOR.sub(lambda color: themed(color[0]), value)
    return value


def themed(color: str) -> str:
    """A colour of the page: a model's follows the mode, and a grey is as far from the ground in dark as it is in light; others stay."""
    if color in PALETTE:
        return f"var(--plot-{PALETTE.index(color) + 1})"
    if color == MUTED:
        return "var(--quiet)"
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    if red == green == blue:
        return f"color-mix(in srgb, var(--ink) {round(100 - red / 2.55)}%, var(--paper))"
    return color
