"""The page as one string of HTML: nothing outside of it is needed to show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.report.page.blocks import Block
from distill.report.page.svg import Drawings
from distill.report.page.text import cell, number_columns, prose


@dataclass(frozen=True)
class Chapter:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        question: what it answers, in one sentence.
        blocks: what it shows.
    """

    name: str
    title: str
    question: str
    blocks: Sequence[Block]


def page(title: str, subtitle: str, chapters: Sequence[Chapter], facts: Mapping[str, str]) -> str:
    """Make a page.

    Args:
        title: its heading.
        subtitle: one sentence below it.
        chapters: in the order in which they are read; the names are different.
        facts: what the page is of, a word or two each, e.g. `{"steps": "400"}`.

    Returns:
        A whole HTML document, which asks for nothing from anywhere.
    """
    environment = Environment(
        loader=PackageLoader("distill.report.page", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(prose=prose, cell=cell, number_columns=number_columns, kind=_kind, drawings=Drawings().of)
    style = resources.files("distill.report.page").joinpath("style.css").read_text(encoding="utf-8")
    template = environment.get_template("page.html.j2")
    return template.render(title=title, subtitle=subtitle, chapters=chapters, facts=facts, style=Markup(style))


def _kind(block: Block) -> str:
    return type(block).__name__.lower()
