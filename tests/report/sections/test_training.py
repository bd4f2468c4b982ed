import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from distill.report.page.blocks import Grid, Missing, Note, Picture
from distill.report.sections.training import Training
from distill.types import SparseTarget
from tests.report import made as runs


def test_what_was_logged_is_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(parents=True)
    for name in ("step-1.ckpt", ".step-2.ckpt.tmp", ".hidden.ckpt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"x" * 10)
    (tmp_path / "checkpoints" / "step-3.ckpt").mkdir()
    (tmp_path / "checkpoints" / "step-3.ckpt" / "part").write_bytes(b"x" * 5)
    given = runs.evidence(tmp_path)
    found = json.loads(json.dumps(Training().figures(given), allow_nan=False))
    assert found["terms"] == ["kd", "ce"]
    assert found["curves"]["val/loss"][0] == [9, 19, 29, 39]
    assert found["curves"]["train/kd"][1] == pytest.approx([0.2, 0.1, 0.0666667, 0.05])
    assert found["end"]["state"] == "settled"
    assert found["pull"] == {"at": "branch points", "shares": {"kd": 0.75, "ce": 0.25}}
    assert found["step_seconds"] == {"missing": "no two logs in a row are of training alone"}  # a validation after each
    assert (found["skipped_steps"], found["restarts"]) == (2, 0)
    assert found["checkpoints"] == {"count": 2, "bytes": 15}
    note, *rest = Training().blocks(found)
    assert isinstance(note, Note)
    assert note.tone == "good"
    assert sum(isinstance(block, Picture) for block in rest) == 4
    rows = dict(next(block for block in rest if isinstance(block, Grid)).rows)
    assert rows["steps skipped, not finite"] == "2"
    assert rows["pull of the terms, at the branch points"] == "kd 75 % · ce 25 %"


def test_the_teachers_share_is_its_time_for_a_token_times_tokens_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 10.0, 10.06, 20.0, 20.12, 30.0, 30.18])  # 0.12 s is the median after the first
    monkeypatch.setattr("distill.report.sections.training.time.perf_counter", lambda: next(ticks))
    given = runs.evidence(tmp_path)  # 100 tokens a second; the batch has 60
    assert Training().figures(given)["teacher_share"] == {"value": pytest.approx(0.2), "estimate": True}


def test_when_the_teachers_share_is_not_known(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    share = lambda **changes: Training().figures(replace(given, **changes))["teacher_share"]["missing"]
    assert "no teacher" in share(subjects={})
    assert "not logged" in share(log=[line for line in given.log if "tokens_per_s" not in line])
    assert "several processes" in share(config={"trainer": {"num_nodes": 2}})
    assert "slower" in share(log=[{**line, "tokens_per_s": 1e9} for line in given.log if "tokens_per_s" in line])


def test_a_teacher_from_a_store_is_asked_too(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    stored = replace(given.subjects["teacher"], target=lambda batch: SparseTarget(*(given.batches[0]["labels"],) * 3))
    assert Training().figures(replace(given, subjects={"teacher": stored}))["teacher_share"]["value"] < 1


def test_what_went_wrong_is_said(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    lines = [*runs.log(), runs.line(29, 20.0, train__loss=1.0), *runs.log(80)[6:]]
    lines = [line | {"train/ce_grad_norm": 1e-6} if "train/ce" in line else line for line in lines]
    found = json.loads(json.dumps(Training().figures(replace(given, log=lines)), allow_nan=False))
    assert found["restarts"] == 1
    note = Training().blocks(found)[0]
    assert note.tone == "warning"
    assert "`ce` was all but silent" in note.text


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    lines = [*runs.log(), runs.line(49, 30.0, train__loss="nan", train__kd="inf")]
    found = json.loads(json.dumps(Training().figures(replace(runs.evidence(tmp_path), log=lines)), allow_nan=False))
    assert found["not_finite"] == {"train/loss": 1, "train/kd": 1}
    assert not any(math.isnan(value) for _, values in found["curves"].values() for value in values)
    note = Training().blocks(found)[0]
    assert "2 logged values were not finite" in note.text
    assert note.tone == "warning"


def test_a_run_without_a_log_or_a_report_says_so(tmp_path: Path) -> None:
    found = Training().figures(replace(runs.evidence(tmp_path), log=[], run={}))
    blocks = Training().blocks(json.loads(json.dumps(found)))
    assert isinstance(blocks[0], Missing)
    terms = Training().figures(replace(runs.evidence(tmp_path), run={}))["terms"]
    assert terms == ["kd", "ce"]


def test_compression_and_schedules_have_a_plot(tmp_path: Path) -> None:
    moving = {"train/kd_temperature": 4.0, "train/sparsity": 0.0}
    lines = [line | {key: value + line["step"] / 100 for key, value in moving.items()} for line in runs.log() if "train/kd" in line]
    run = {"steps": 40, "compression": [{"class": "Pruning", "settled": ["masked 3 of 4 weights"], "sparsity": 0.75, "bits": {"a": 4}}]}
    found = Training().figures(replace(runs.evidence(tmp_path), log=lines, run=run))
    assert found["compression"] == [{"class": "Pruning", "settled": ["masked 3 of 4 weights"], "sparsity": 0.75}]
    *_, last, grid = Training().blocks(found)
    assert [figure.axes[0].get_ylabel() for figure in last.figure] == ["temperature", "masked, %"]
    assert ["compression: Pruning", "masked 3 of 4 weights"] in grid.rows
