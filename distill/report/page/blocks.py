"""What a chapter is made of. Blocks say what is shown; how it looks is the template's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Note:
    """A sentence or two. `good` and `warning` say what is to be noticed; plain text explains."""

    text: str
    tone: Literal["plain", "good", "warning"] = "plain"


@dataclass(frozen=True)
class Tile:
    """One figure, large: what it is, its value, and its interval or what it is compared with."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    """A row of them."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Grid:
    """A table; the first column names the rows.

    Attributes:
        head: of the columns.
        rows: their cells, as text; "" where there is nothing to say.
        caption: what the figures are, with their units.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Picture:
    """A plot, or several that are read together.

    Attributes:
        figure: of matplotlib, made by `plots.new`; several stand side by side where there is room, and one below the other on a phone.
        alt: what it shows, in words, for those who cannot see it.
        caption: how to read it.
    """

    figure: Figure | Sequence[Figure]
    alt: str
    caption: str


@dataclass(frozen=True)
class Missing:
    """What could not be measured, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Fold:
    """What few will read: closed until it is opened; `text` is shown as it is, in a fixed-width face."""

    summary: str
    text: str


Block = Note | Tiles | Grid | Picture | Missing | Fold
