import re
from html.parser import HTMLParser

import pytest

from distill.report.page.blocks import Fold, Grid, Missing, Note, Tile, Tiles
from distill.report.page.render import Chapter, page
from tests.report.page.example import CHAPTERS, NASTY, html


class Reader(HTMLParser):
    """The tags of a document, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def example() -> str:
    return html()


def test_nothing_comes_from_outside(example: str) -> None:
    for tag, attributes in Reader(example).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in example
    assert re.findall(r"url\((?!#)[^)]*\)", example) == []
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in example


def test_whatever_comes_from_data_is_text(example: str) -> None:
    assert NASTY not in example
    said = " ".join(Reader(example).text)
    assert said.count(NASTY) > 20


def test_chapters_stand_in_order_with_a_link_to_each(example: str) -> None:
    tags = Reader(example).tags
    assert [attributes["id"] for tag, attributes in tags if tag == "section"] == CHAPTERS
    links = [attributes["href"] for tag, attributes in tags if tag == "a" and attributes.get("class") != "skip"]
    assert links == [f"#{name}" for name in CHAPTERS]


def test_every_block_says_what_it_has_to_say() -> None:
    blocks = [
        Note("plain words"),
        Note("well done", "good"),
        Note("take care", "warning"),
        Tiles([Tile("a label", "12.3 %", "a detail")]),
        Grid(["", "head"], [["row", "4.2 (4.1 – 4.3)"], ["empty", ""]], "a caption"),
        Missing("energy", "no meter"),
        Fold("a fold", "  kept\n    as it is"),
    ]
    text = page("a title", "a subtitle", [Chapter("one", "One: two", "What?", blocks)], {"a fact": "of it"})
    said = [words for words in Reader(text).text if words]
    for words in (
        "a title",
        "a subtitle",
        "a fact",
        "of it",
        "One",
        "One: two",
        "What?",
        "plain words",
        "well done",
        "take care",
        "a label",
    ):
        assert words in said
    for words in ("12.3 %", "a detail", "head", "row", "4.2", "(4.1 – 4.3)", "a caption", "energy", "not measured: no meter", "a fold"):
        assert words in said
    assert "  kept\n    as it is" in text
    labels = [attributes["aria-label"] for _, attributes in Reader(text).tags if attributes.get("class") == "mark"]
    assert labels == ["Good:", "Warning:"]


def test_a_page_without_facts_or_blocks() -> None:
    text = page("a", "b", [Chapter("one", "One", "What?", [])], {})
    assert "<dl" not in text
    assert text.startswith("<!DOCTYPE html>")
