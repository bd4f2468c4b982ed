"""Runs side by side: what is said of runs whose difference is known, and of folders that are no runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.runs import sidebyside
from distill.report.runs.compare import write
from distill.report.runs.finished import Finished
from distill.types import ConfigError
from tests.report.made import finished, observed

CONFIG = {"name": "x", "seed_everything": 0, "model": {"losses": {"kd": {"temperature": 1.0}}}}
OTHER = {"name": "y", "seed_everything": 0, "model": {"losses": {"kd": {"temperature": 4.0}, "ce": {}}}}


def runs(tmp_path: Path, per_row: int = 1) -> tuple[Path, Path]:
    """The second is right where the first is, and on 60 of 400 positions more."""
    first = np.arange(400) % 2 == 0
    second = first | (np.arange(400) < 120)
    a = finished(tmp_path / "a", observed(np.ones(400), first, per_row), CONFIG)
    return a, finished(tmp_path / "b", observed(np.ones(400), second, per_row), OTHER, latency=1.0)


def loaded(*folders: Path) -> list[Finished]:
    return [Finished.load(folder, folder.name) for folder in folders]


def only(kind: type, blocks: list[Block]) -> list:
    return [block for block in blocks if isinstance(block, kind)]


def test_the_page_holds_every_chapter_and_run(tmp_path: Path) -> None:
    out = write(runs(tmp_path), tmp_path / "deep" / "compare.html")
    text = out.read_text()
    for anchor in ("figures", "differences", "tradeoff", "training", "configuration"):
        assert f'id="{anchor}"' in text
    assert "b is better by 15.0 points" in text
    assert not [file for file in out.parent.iterdir() if file != out]


def test_figures_in_a_column_a_run(tmp_path: Path) -> None:
    (grid,) = only(Grid, sidebyside.headlines(loaded(*runs(tmp_path))))
    assert grid.head == ["", "a", "b"]
    lines = {row[0]: row[1:] for row in grid.rows}
    assert lines["accuracy"][0].startswith("50.0 % (4")
    assert lines["accuracy"][1].startswith("65.0 % (6")
    assert lines["teacher's accuracy kept"][1].startswith("65.0 % (6")
    assert lines["time a row"] == ["2.00 ms", "1.00 ms"]
    assert lines["size"] == ["1.00 MB", "1.00 MB"]
    assert lines["training took"] == ["12.0 s", "12.0 s"]
    assert lines["ECE"] == ["4.0 % (3.0 – 5.0)"] * 2
    assert "accepted as the teacher's draft" not in lines


def test_the_sentence_has_the_accuracy_of_the_table(tmp_path: Path) -> None:
    """The run printed that of all rows, or of a few; the report is of its own."""
    folders = runs(tmp_path)
    report = json.loads((folders[0] / "report.json").read_text())
    report["models"]["student distilled"]["accuracy"] = 0.99
    (folders[0] / "report.json").write_text(json.dumps(report))
    (note,) = only(Note, sidebyside.headlines(loaded(*folders)))
    assert note.text.startswith("b has the highest accuracy, 65.0 %")


def test_one_row_has_figures_without_intervals(tmp_path: Path) -> None:
    folders = [finished(tmp_path / name, observed([1, 1, 1], [1, 0, 1], 3), CONFIG) for name in ("a", "b")]
    (grid,) = only(Grid, sidebyside.headlines(loaded(*folders)))
    assert {row[0]: row[1] for row in grid.rows}["accuracy"] == "66.7 %"
    assert "only one held-out row" in only(Missing, sidebyside.tests(loaded(*folders)))[0].why


def test_the_same_rows_are_paired(tmp_path: Path) -> None:
    blocks = sidebyside.tests(loaded(*runs(tmp_path)))
    (note,), (grid,) = only(Note, blocks), only(Grid, blocks)
    assert "paired" in note.text
    assert "different teachers" not in note.text
    lines = dict(grid.rows)
    assert lines["accuracy"].startswith("b is better by 15.0 points (1")
    assert lines["loss"].startswith("no difference")
    assert lines["McNemar's exact test"] == f"p = {2 * 0.5**60:.2g}: a alone is right on 0 rows, b alone on 60"


def test_tokens_get_no_mcnemar(tmp_path: Path) -> None:
    (grid,) = only(Grid, sidebyside.tests(loaded(*runs(tmp_path, per_row=4))))
    assert "McNemar's exact test" not in dict(grid.rows)


def test_other_rows_and_other_teachers_are_said(tmp_path: Path) -> None:
    a, _ = runs(tmp_path)
    other = finished(tmp_path / "c", observed(np.ones(300), np.ones(300)), CONFIG, teacher="u")
    blocks = sidebyside.tests(loaded(a, other))
    (note,), (grid,) = only(Note, blocks), only(Grid, blocks)
    assert note.tone == "warning"
    assert "different held-out rows" in note.text
    assert "different teachers" in note.text
    assert "McNemar's exact test" not in dict(grid.rows)
    assert "c is better by 50.0 points" in dict(grid.rows)["accuracy"]


def test_the_front_is_of_all_runs_and_a_shared_teacher_is_one_point(tmp_path: Path) -> None:
    (picture,) = only(Picture, sidebyside.tradeoffs(loaded(*runs(tmp_path))))
    names = {text.get_text() for text in picture.figure[0].axes[0].texts}
    assert names == {"teacher", "a: student distilled", "b: student distilled"}
    assert "by latency b: student distilled, teacher." in picture.caption
    other = finished(tmp_path / "c", observed(np.ones(400), np.ones(400)), CONFIG, teacher="u")
    (picture,) = only(Picture, sidebyside.tradeoffs(loaded(tmp_path / "a", other)))
    assert sum(text.get_text().endswith("teacher") for text in picture.figure[0].axes[0].texts) == 2


def test_only_keys_that_differ(tmp_path: Path) -> None:
    (grid,) = only(Grid, sidebyside.settings(loaded(*runs(tmp_path))))
    assert grid.rows == [["model.losses.kd.temperature", "1.0", "4.0"], ["model.losses.ce", "—", "{}"]]
    twin = finished(tmp_path / "c", observed([1], [1]), CONFIG | {"name": "z"})
    assert "the same" in only(Note, sidebyside.settings(loaded(tmp_path / "a", twin)))[0].text


def test_settings_of_a_branch_that_one_run_lacks_are_those_that_say_something(tmp_path: Path) -> None:
    with_teacher = {"teacher": {"class_path": "T", "init_args": {"model": "m", "revision": None}}}
    one = finished(tmp_path / "one", observed([1] * 9, [1] * 9), with_teacher)
    other = finished(tmp_path / "other", observed([1] * 9, [1] * 9), {"teacher": None})
    (grid,) = only(Grid, sidebyside.settings(loaded(one, other)))
    assert list(grid.rows) == [["teacher.class_path", "T", "—"], ["teacher.model", "m", "—"]]


def test_curves_are_laid_over_one_another(tmp_path: Path) -> None:
    (picture,) = only(Picture, sidebyside.curves(loaded(*runs(tmp_path))))
    (axes,) = picture.figure[0].axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[10, 20], [10, 20]]
    assert {text.get_text() for text in axes.texts} == {"a", "b"}


def test_a_run_whose_rows_are_gone_is_compared_by_what_it_printed(tmp_path: Path) -> None:
    a, b = runs(tmp_path)
    (b / "report_rows.npz").unlink()
    blocks = sidebyside.headlines(loaded(a, b))
    assert {row[0]: row[2] for row in only(Grid, blocks)[0].rows}["accuracy"] == "65.0 %"
    assert "there is no" in only(Missing, blocks)[0].why
    assert only(Missing, sidebyside.tests(loaded(a, b)))


def test_what_cannot_be_compared_is_said_in_a_sentence(tmp_path: Path) -> None:
    a, b = runs(tmp_path)
    out = tmp_path / "out.html"
    with pytest.raises(ConfigError, match="two runs or more are wanted to compare, got 1"):
        write([a], out)
    with pytest.raises(ConfigError, match="are the same run"):
        write([a, tmp_path / "b" / ".." / "a"], out)
    with pytest.raises(ConfigError, match=r"there is no folder '.*/none'"):
        write([a, tmp_path / "none"], out)
    report = json.loads((b / "report.json").read_text())
    del report["sections"]
    (b / "report.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=r"has no chapters yet; write them first: python train.py report .*/b"):
        write([a, b], out)
    (b / "report.json").write_text('{"models": {')
    with pytest.raises(ConfigError, match=r"report.json' is no JSON"):
        write([a, b], out)
    (b / "report.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no '.*/b/report.json'"):
        write([a, b], out)
    assert not out.exists()


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    seen = observed([1, 1], [1, 0])
    folders = [finished(tmp_path / parent / "run", seen, CONFIG) for parent in ("x", "y")]
    text = write(folders, tmp_path / "out.html").read_text()
    assert "x/run" in text
    assert "y/run" in text
