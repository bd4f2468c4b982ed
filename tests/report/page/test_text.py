from distill.report.page.blocks import Grid
from distill.report.page.text import cell, number_columns, prose

HARD = "\N{NO-BREAK SPACE}"


def test_text_is_escaped_and_only_backquotes_make_code() -> None:
    assert prose("<b> & `a < b` 'x'") == "&lt;b&gt; &amp; <code>a &lt; b</code> &#39;x&#39;"
    assert prose("one ` alone") == "one ` alone"


def test_a_figure_or_an_interval_is_never_broken_over_two_lines() -> None:
    assert prose("keeps 86.3 % (85.1 – 87.4) of it") == f'keeps 86.3{HARD}% <span class="range">(85.1 – 87.4)</span> of it'
    assert prose("−0.2 – 3.1 · of") == '<span class="range">−0.2 – 3.1</span> · of'
    assert prose("a word – another") == "a word – another"
    assert prose("<b>1 – 2</b>") == '<span class="range">&lt;b&gt;1 – 2&lt;/b&gt;</span>'


def test_a_negative_figure_has_a_minus_and_a_date_its_hyphens() -> None:
    assert cell("-0.2 (-0.5 – +0.1)") == '<span class="value">−0.2</span> <span class="interval">(−0.5 – +0.1)</span>'
    assert cell("-3") == "−3"
    assert cell("2026-11-21") == "2026-11-21"
    assert cell("x -3") == "x -3"


def test_an_interval_is_set_apart_from_its_figure() -> None:
    assert cell("86.3 % (85.1 – 87.4)") == '<span class="value">86.3 %</span> <span class="interval">(85.1 – 87.4)</span>'
    assert cell("−0.2 (−0.5 – 0.1)") == '<span class="value">−0.2</span> <span class="interval">(−0.5 – 0.1)</span>'
    assert cell("<i> (1 – 2)") == '<span class="value">&lt;i&gt;</span> <span class="interval">(1 – 2)</span>'
    assert cell("text (in brackets)") == "text (in brackets)"


def test_columns_of_numbers_are_told_from_text() -> None:
    rows = [["1", "86.3 % (85 – 87)", "", "", "3f9a1c", "12"], ["2", "−0.2", "≈ 4 ms", "", "a81b0c", "no"], ["3", "< 0.1 %"]]
    assert number_columns(Grid(["", *"abcde"], rows, "")) == {1, 2}
