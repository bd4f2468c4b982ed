"""A report in a browser: at the widths of a phone and of a desk, in light, in dark and on paper."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import browser
from tests.browser import DESK, PHONE, VIEWS, View, opened, problems
from tests.report.page.example import CHAPTERS, MODELS, NASTY, write


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_nothing_is_wrong_with_a_page(chromium: Any, report: Path, view: View, tmp_path: Path) -> None:
    assert problems(chromium, report, CHAPTERS, view, tmp_path) == []
    assert (tmp_path / f"report-{view}.png").stat().st_size > 10_000


IMAGE, SCRIPT = '<img alt="" src="https://example.org/a.png">', "<script>1</script>"
POLICY = '<meta http-equiv="Content-Security-Policy"'


@pytest.mark.parametrize(
    ("view", "old", "new", "said"),
    [
        (PHONE, "</main>", '<p style="width: 600px">wide</p></main>', "overflows: "),
        (PHONE, 'class="scroll"', 'class="box"', "overflows: "),
        (PHONE, "</main>", f"{IMAGE}</main>", "violates the following Content Security Policy"),
        (PHONE, POLICY, f'{IMAGE}<meta name="none"', "asks for https://example.org/a.png"),
        (PHONE, '<section id="cost"', '<section id="price"', "its chapters are"),
        (PHONE, "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;", NASTY, "holds a script"),
        (PHONE, 'id="plot2-', 'id="plot1-', "names twice"),
        (PHONE, "font-size: 9px", "font-size: 7px", "text of 7"),
        (DESK, "--quiet: #585f6a", "--quiet: #aaaaaa", "contrast of 2.32 is less than 4.5"),
        (DESK, "--plot-1: #0f5fbf", "--plot-1: #c0d8f0", "is less than 3: the colour --plot-1"),
        (VIEWS[-1], ".wide :is(.value, .interval, .number) { white-space: normal; }", "", "cut in print"),
    ],
)
def test_what_is_wrong_is_noticed(chromium: Any, report: Path, tmp_path: Path, view: View, old: str, new: str, said: str) -> None:
    whole, broken = report.read_text(encoding="utf-8"), tmp_path / "broken.html"
    assert old in whole
    broken.write_text(whole.replace(old, new), encoding="utf-8")
    assert said in "\n".join(problems(chromium, broken, CHAPTERS, view))


def test_a_wide_table_scrolls_in_its_own_box_by_keyboard_and_keeps_its_first_column(chromium: Any, report: Path) -> None:
    with opened(chromium, report, PHONE) as seen:
        box = seen.page.get_by_role("region", name="Ten figures a model")
        box.focus()
        for _ in range(10):
            seen.page.keyboard.press("ArrowRight")
        seen.page.wait_for_function("document.activeElement.scrollLeft > 100")
        left = "document.activeElement.querySelector('tbody th').getBoundingClientRect().left"
        assert seen.page.evaluate(left) == seen.page.evaluate("document.activeElement.getBoundingClientRect().left")


def test_whoever_cannot_see_the_page_can_find_the_way(chromium: Any, report: Path) -> None:
    with opened(chromium, report) as seen:
        page = seen.page
        assert page.get_by_role("heading", level=1).count() == 1
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(heading => +heading.tagName[1])")
        assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
        for landmark in ("banner", "main"):
            assert page.get_by_role(landmark).count() == 1
        links = page.get_by_role("navigation", name="Chapters").get_by_role("link")
        assert links.count() == len(CHAPTERS)
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the report")
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        assert skip.evaluate("element => element === document.activeElement")


def test_tables_and_plots_have_names_and_heads(chromium: Any, report: Path) -> None:
    with opened(chromium, report) as seen:
        table = seen.page.get_by_role("table", name="Ten figures a model")
        assert table.get_by_role("columnheader").count() == 10
        assert table.get_by_role("rowheader").all_inner_texts() == MODELS
        assert seen.page.get_by_role("img", name=f"Accuracy of six models {NASTY}", exact=True).count() == 1
        assert seen.page.get_by_role("img", name="Two reliability diagrams (Plot 2 of 2.)").count() == 1
        assert seen.page.locator("svg").count() == seen.page.locator("svg[role=img]").count() == 8


def test_plots_stand_side_by_side_on_a_desk_and_one_below_the_other_on_a_phone(chromium: Any, report: Path) -> None:
    tops = "[...document.querySelectorAll('#calibration svg')].map(plot => plot.getBoundingClientRect().top)"
    with opened(chromium, report, DESK) as seen:
        left, right = seen.page.evaluate(tops)
        assert left == right
    with opened(chromium, report, PHONE) as seen:
        first, second = seen.page.evaluate(tops)
        assert second > first + 200


def test_a_page_is_dark_where_the_reader_wants_it_dark_and_plots_with_it(chromium: Any, report: Path) -> None:
    seen_in = {}
    for scheme in ("light", "dark"):
        with opened(chromium, report, View(1440, 900, scheme)) as seen:
            ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
            line = seen.page.evaluate("getComputedStyle(document.querySelector('svg [style*=\"--plot-1\"]')).stroke")
            seen_in[scheme] = ground, line
    assert seen_in == {"light": ("rgb(255, 255, 255)", "rgb(15, 95, 191)"), "dark": ("rgb(20, 23, 28)", "rgb(70, 130, 238)")}


def test_paper_is_white_and_holds_no_plot_or_row_in_two_halves(chromium: Any, report: Path) -> None:
    with opened(chromium, report, VIEWS[-1]) as seen:
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        broken = "[...document.querySelectorAll('svg, tr, .note')].map(one => getComputedStyle(one).breakInside)"
        assert set(seen.page.evaluate(broken)) == {"avoid"}
        assert seen.page.pdf(format="A4").startswith(b"%PDF")


def test_without_chromium_and_without_apt_get_the_tests_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="there is no Chromium, and no apt-get to install it with"):
        browser.program()
