import json
import re
from typing import Any

import pytest

from distill.report.page.blocks import Fold, Grid, Missing, Note, Picture
from distill.report.probes.robustness import STRENGTHS
from distill.report.sections import all_sections
from distill.report.sections.robustness import Robustness, sentence
from tests import models
from tests.report.disturbed import evidence, rows


def _interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _figures(gaps: dict[str, float], half: float = 0.05) -> dict[str, Any]:
    """Of a teacher that keeps 80 % of its accuracy under every test, and a student that keeps as much more as `gaps` say."""
    tests = {}
    for name, strengths in STRENGTHS.items():
        accuracy = [_interval(0.5 - 0.05 * i) for i in range(len(strengths) + 1)]
        gap = gaps.get(name, 0.0)
        of_models = {who: {"accuracy": accuracy, "kept": _interval(kept), "note": ""} for who, kept in (("teacher", 0.8), ("S", 0.8 + gap))}
        tests[name] = {"strengths": [0.0, *strengths], "models": of_models, "difference": _interval(gap, half)}
    sizes = {"attacked": 16, "disturbed": 32}
    common = {"names": ["teacher", "S before", "S"], "student": "S", "absent": {}, "unit": "token", "of_rows": 270}
    return {**common, "rows": sizes, "positions": {"attacked": 2047, "disturbed": 4095}, "tests": tests}


def test_it_is_found_in_its_place():
    (section,) = [each for each in all_sections() if isinstance(each, Robustness)]
    assert (section.name, section.order) == ("robustness", 40)


def test_a_student_that_falls_faster_is_a_warning_that_names_the_worst():
    note = sentence(_figures({"noise": -0.3, "replaced": -0.1, "pgd": -0.04}))
    assert note.tone == "warning"
    assert note.text == (
        "The S falls faster than its teacher under noise on the embeddings: on average over the strengths it keeps 50 % of its accuracy, "
        "the teacher 80 %. It falls faster also under: wrong tokens."
    )


def test_a_student_that_holds_better_is_good_news():
    note = sentence(_figures({"pgd": 0.1, "noise": -0.01}))
    assert note.tone == "good"
    assert (
        "slower under attack in 3 steps (PGD): on average over the strengths it keeps 90 % of its accuracy, the teacher 80 %" in note.text
    )


def test_where_the_rows_do_not_tell_they_say_how_much_they_leave_open():
    note = sentence(_figures({"noise": -0.02}))
    assert note.tone == "plain"
    assert "show no test under which the S falls faster" in note.text
    assert "it may keep up to 7 points less" in note.text


def test_what_is_not_measured_is_not_claimed():
    figures = _figures({"noise": -0.3})
    figures["tests"]["noise"]["difference"] = {"missing": "why"}
    assert "falls faster than its teacher under" not in sentence(figures).text


def test_alone_it_is_said_what_it_keeps():
    figures = _figures({})
    for test in figures["tests"].values():
        del test["models"]["teacher"]
        test["difference"] = {"missing": "there is only one to look at"}
    note = sentence(figures)
    assert note.text.startswith(
        "The S stands alone: on average over the strengths it keeps of its accuracy 80 % (75 – 85) under features moved"
    )


def test_the_page_shows_curves_and_every_figure():
    figures = json.loads(json.dumps(_figures({"noise": -0.3})))
    note, picture, grid, fold = Robustness().blocks(figures)
    assert isinstance(note, Note)
    assert isinstance(picture, Picture)
    assert isinstance(grid, Grid)
    assert isinstance(fold, Fold)
    panels = list(picture.figure)
    assert [panel.axes[0].get_title("left") for panel in panels] == [
        "Features moved against the head",
        "Attack on the embeddings",
        "Noise on the embeddings",
        "Wrong tokens",
    ]
    assert [line.get_xdata().tolist() for line in panels[3].axes[0].get_lines()] == [[0, 10, 20, 40]] * 2
    assert panels[3].axes[0].get_lines()[1].get_ydata().tolist() == pytest.approx([50, 45, 40, 35])
    assert len(panels[1].axes[0].get_lines()) == 4
    assert grid.head == ["accuracy kept under", "teacher", "S", "difference, points"]
    assert len(grid.rows) == 5
    assert ["noise", "80.0 % (75.0 – 85.0)", "50.0 % (45.0 – 55.0)", "−30.0 (−35.0 – −25.0)"] in grid.rows
    lines = [re.split("  +", line) for line in fold.text.splitlines()]
    assert lines[0] == ["", "teacher", "S"]
    assert ["noise, σ = 1", "40.0 % (35.0 – 45.0)", "40.0 % (35.0 – 45.0)"] in lines
    assert len(lines) == 1 + sum(len(test["strengths"]) for test in figures["tests"].values())
    assert "on 16 of 270 held-out rows (2,047 tokens), the rest on 32 (4,095 tokens)" in grid.caption
    assert "noise on the embeddings: S from 50.0 % to 35.0 %" in picture.alt


def test_what_is_missing_is_said_once_for_each_reason():
    figures = _figures({})
    figures["tests"]["margin"]["models"]["teacher"]["note"] = "an upper bound: so it is"
    for name in ("fgsm", "pgd"):
        figures["tests"][name]["models"]["teacher"] = {"missing": "its weights are quantised"}
        figures["tests"][name]["difference"] = {"missing": "there is only one to look at"}
    blocks = Robustness().blocks(json.loads(json.dumps(figures)))
    missing = [block for block in blocks if isinstance(block, Missing)]
    assert missing == [Missing("the teacher: attack in one step (FGSM), attack in 3 steps (PGD)", "its weights are quantised")]
    grid = next(block for block in blocks if isinstance(block, Grid))
    assert next(row for row in grid.rows if row[0] == "PGD")[1:] == ["", "80.0 % (75.0 – 85.0)", ""]
    assert "The margin is an upper bound: so it is." in grid.caption


def test_a_whole_run_without_a_teacher_is_shown():
    section = Robustness()
    given = evidence({"student": models.causal_lm()}, rows(count=12), absent={"teacher": "it is a store"})
    blocks = section.blocks(json.loads(json.dumps(section.figures(given), allow_nan=False)))
    assert blocks[-1] == Missing("robustness of the teacher", "it is a store")
    assert isinstance(blocks[1], Picture)
