import re
from xml.etree import ElementTree

import numpy as np
import pytest

from distill.report.page import plots
from distill.report.page.blocks import Picture
from distill.report.page.svg import Drawings, themed

SVG = "{http://www.w3.org/2000/svg}"


def picture(columns: int = 1) -> Picture:
    figure, axes = plots.new(3.0 * columns, 2.0, columns)
    for i, each in enumerate(axes):
        each.plot([0, 1, 2], [1, 3, 2], color=plots.PALETTE[1], marker="o")
        each.set_xlim(0, 1.5)  # the line is cut, so that there is a clip path
        each.set_xlabel(f"axis <{i}>")
    return Picture(figure, 'what "it" shows <b>', "")


def test_it_is_well_formed_scales_and_says_what_it_shows() -> None:
    (text,) = Drawings().of(picture())
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox") == "0 0 216 144"
    assert (root.get("width"), root.get("height")) == (None, None)
    assert root.get("role") == "img"
    assert root.find(f"{SVG}desc").text == 'what "it" shows <b>'
    assert root.find(f"{SVG}desc").get("id") == root.get("aria-labelledby")
    assert "axis <0>" in [words.text for words in root.iter(f"{SVG}text")]


def test_nothing_of_it_depends_on_the_day_the_machine_or_its_place() -> None:
    one, same = Drawings().of(picture()), Drawings().of(picture())
    assert one == same
    for unwanted in ("<?xml", "DOCTYPE", "metadata", "<style", "DejaVu", "http://purl.org"):
        assert unwanted not in one[0]


def test_names_are_unique_on_a_page_and_whatever_is_referred_to_is_there() -> None:
    drawings = Drawings()
    text = "".join(drawings.of(picture()) + drawings.of(picture(columns=2)))
    names = re.findall(r'\bid="([^"]+)"', text)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert len(names) == len(set(names))
    assert len(used) > 10
    assert {a or b for a, b in used} <= set(names)


def test_colours_are_those_of_the_page() -> None:
    (text,) = Drawings().of(picture())
    assert "var(--plot-2)" in text
    assert not re.search("#[0-9a-f]{6}", text)
    assert themed(plots.INK) == "color-mix(in srgb, var(--ink) 100%, var(--paper))"
    assert themed(plots.PAPER) == "color-mix(in srgb, var(--ink) 0%, var(--paper))"
    assert themed(plots.MUTED) == "var(--quiet)"
    assert themed("#123456") == "#123456"


def test_words_in_a_model_s_colour_are_darker_than_its_line() -> None:
    figure, (axes,) = plots.new()
    axes.text(0, 0, "its name", color=plots.PALETTE[4])
    (text,) = Drawings().of(Picture(figure, "", ""))
    (style,) = [words.get("style", "") for words in ElementTree.fromstring(text).iter(f"{SVG}text") if words.text == "its name"]
    assert "fill: color-mix(in srgb, var(--plot-5) 60%, var(--ink))" in style


def test_columns_come_apart_each_with_its_own_colour_bar_and_the_figure_is_as_it_was() -> None:
    figure, axes = plots.new(6.0, 2.0, columns=2)
    for i, each in enumerate(axes):
        figure.colorbar(each.imshow(np.eye(3)), ax=each, label=f"bar {i}")
        each.set_title(f"title {i}")
    left, right = Drawings().of(Picture(figure, "alt", ""))
    for text, mine, other in ((left, 0, 1), (right, 1, 0)):
        assert f">title {mine}<" in text
        assert f">bar {mine}<" in text
        assert f">title {other}<" not in text
        assert f">bar {other}<" not in text
    assert all(each.get_visible() for each in figure.axes)
    assert "constrained" in type(figure.get_layout_engine()).__name__.lower()


@pytest.mark.parametrize("add", ["suptitle", "legend", "text"])
def test_a_figure_with_words_of_its_own_stays_whole(add: str) -> None:
    whole = picture(columns=2)
    if add == "suptitle":
        whole.figure.suptitle("all of it")
    elif add == "legend":
        whole.figure.legend(whole.figure.axes[0].get_lines(), ["a line"])
    else:
        whole.figure.text(0, 0, "words")
    assert len(Drawings().of(whole)) == 1


def test_several_figures_are_counted_in_their_alternatives() -> None:
    figures = [picture().figure, picture(columns=2).figure]
    alts = [ElementTree.fromstring(text).find(f"{SVG}desc").text for text in Drawings().of(Picture(figures, "alt.", ""))]
    assert alts == ["alt. (Plot 1 of 3.)", "alt. (Plot 2 of 3.)", "alt. (Plot 3 of 3.)"]
