"""Text of figures and sentences, as the template writes it; all of it is escaped."""

import re

from markupsafe import Markup, escape

from distill.report.page.blocks import Grid

_FIGURE = re.compile(r"[<>≤≥≈~±+−-]?\s?\d")
_INTERVAL = re.compile(r"(?P<value>.*\S) (?P<interval>\(\S+ – \S+\))", re.DOTALL)
_NEGATIVE = re.compile(r"(?<![\w.])-(?=\d)")
_CODE = re.compile(r"`([^`]+)`")
_UNIT = re.compile(r"(?<=\d) (?=%)")
_RANGE = re.compile(r"[^\s<>]*\d[^\s<>]* – [^\s<>]*\d[^\s<>]*")  # a no-break space does not keep what a dash lets go


def prose(text: str) -> Markup:
    """A sentence; what stands in backquotes is code, and a figure or an interval is on one line."""
    escaped = _UNIT.sub("\N{NO-BREAK SPACE}", str(escape(text)))
    return Markup(_RANGE.sub(r'<span class="range">\g<0></span>', _CODE.sub(r"<code>\1</code>", escaped)))


def cell(text: str) -> Markup:
    """A figure; its interval is set apart from it."""
    found = _INTERVAL.fullmatch(text)
    if not found:
        return prose(_NEGATIVE.sub("−", text) if _FIGURE.match(text) else text)
    value, interval = (_NEGATIVE.sub("−", found[part]) for part in ("value", "interval"))
    return Markup('<span class="value">{}</span> <span class="interval">{}</span>').format(value, interval)


def number_columns(grid: Grid) -> set[int]:
    """Which columns hold numbers alone, which are then set one below the other; never the first, which names the rows."""
    columns = range(1, len(grid.head))
    return {i for i in columns if _numbers([row[i] for row in grid.rows if len(row) > i and row[i]])}


def _numbers(texts: list[str]) -> bool:
    return bool(texts) and all(_FIGURE.match(text) for text in texts)
