"""Figures of tiny models, and what is said of figures that are known."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.report.costs.cost import Clocked, bytes_of
from distill.report.evidence import Evidence, NotMeasured, Subject
from distill.report.page.blocks import Grid, Missing, Note, Picture
from distill.report.sections import cost
from distill.report.sections.cost import Cost
from distill.types import MixedTarget, Outputs, SparseTarget
from tests.report import made as runs


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SECONDS", 0.0)  # as few rounds as there may be


def slow(model: Any, batch: Any) -> Outputs:
    time.sleep(0.02 * len(batch["input_ids"]))
    return Outputs(torch.zeros(len(batch["input_ids"]), 1, 3), nn.Identity())


def test_counted_by_hand_and_asked_as_served(tmp_path: Path) -> None:
    seen: list[Any] = []
    given = runs.evidence(tmp_path)
    model = given.subjects["teacher"].model

    def target(batch: Any) -> Outputs:
        seen.append(batch)
        return slow(model, batch)

    subjects = {"teacher": Subject(target, model, tmp_path / "teacher"), **dict(list(given.subjects.items())[1:])}
    subjects["student before"] = given.subjects["teacher"]
    batches = [{**batch, "position_ids": batch["input_ids"]} for batch in given.batches]
    found = json.loads(json.dumps(Cost().figures(replace(given, subjects=subjects, batches=batches)), allow_nan=False))
    assert found["rounds"] == 3
    assert found["batch"] == 8
    assert set(found["models"]) == {"teacher", "student distilled"}
    assert {len(batch["input_ids"]) for batch in seen} == {1, 8}
    assert all(set(batch) == {"input_ids", "attention_mask", "labels"} for batch in seen)  # a packed row is served as one document
    teacher, student = found["models"]["teacher"], found["models"]["student distilled"]
    assert student["parameters"] == sum(p.numel() for p in given.subjects["student distilled"].model.parameters())
    assert student["bytes"] == bytes_of(tmp_path / "student distilled")
    assert student["accuracy"]["value"] == pytest.approx(0.5)
    assert student["accuracy"]["low"] < 0.5 < student["accuracy"]["high"]
    assert student["loss"]["value"] == pytest.approx(1.0)
    assert teacher["latency_ms"] >= 20
    assert teacher["energy_source"]
    assert found["ratios"]["latency"]["value"] == pytest.approx(teacher["latency_ms"] / student["latency_ms"])
    assert found["ratios"]["bytes"] == pytest.approx(teacher["bytes"] / student["bytes"])
    assert found["ratios"]["throughput"]["value"] == pytest.approx(student["throughput"] / teacher["throughput"])


def test_the_last_batch_may_be_small_and_the_first_too(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    few = replace(given, batches=[{name: value[:2] for name, value in given.batches[0].items()}])
    assert Cost().figures(few)["batch"] == 2


def test_what_cannot_be_timed_is_missing_with_why(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    stored = lambda batch: SparseTarget(*(torch.zeros(1, 1, 1),) * 3)
    subjects = {
        "teacher": Subject(stored, None, tmp_path),
        "student distilled": given.subjects["student distilled"],
        "onnx": Subject(stored),
    }
    found = Cost().figures(replace(given, subjects=subjects, absent={"student alone": "none was trained", "student before": "x"}))
    assert "store" in found["models"]["teacher"]["missing"]
    assert "elsewhere" in found["models"]["onnx"]["missing"]
    assert found["models"]["student alone"] == {"missing": "none was trained"}
    assert "student before" not in found["models"]
    assert "no figure of the teacher" in found["ratios"]["missing"]
    blocks = Cost().blocks(json.loads(json.dumps(found)))
    assert {block.what for block in blocks if isinstance(block, Missing)} == {"teacher", "onnx", "student alone"}
    with pytest.raises(NotMeasured):
        Cost().figures(replace(given, subjects={"teacher": subjects["teacher"]}))


def test_a_loss_that_is_infinite_takes_only_itself_away(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    given.observed.models["student distilled"].nll[3] = np.inf
    found = Cost().figures(given)
    assert "infinite" in found["models"]["student distilled"]["loss"]["missing"]
    assert found["models"]["student distilled"]["accuracy"]["value"] == 0.5


def test_several_teachers_are_all_run() -> None:
    ran: list[str] = []

    class Head(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            ran.append("head")
            return features

    part = Outputs(torch.ones(1, 2, 3), Head())
    assert cost._run(Subject(lambda batch: MixedTarget((part, part), torch.ones(1, 2, 2), "apart")), {}).shape == (1, 2, 3)
    assert len(ran) == 2


def test_the_interval_of_a_ratio_is_of_the_rounds() -> None:
    assert cost._ratio([4.0] * 9, [2.0] * 9) == {"value": 2.0, "low": 2.0, "high": 2.0}
    busy = np.linspace(1, 3, 21)  # the machine slows both alike, in turn: the ratio of medians varies far less than the times
    paired = cost._ratio((4 * busy).tolist(), busy.tolist())
    assert paired == {"value": pytest.approx(4.0), "low": pytest.approx(4.0), "high": pytest.approx(4.0)}
    noisy = cost._ratio(np.random.default_rng(0).normal(4, 0.5, 25).tolist(), [1.0] * 25)
    assert noisy["high"] - noisy["low"] == pytest.approx(2 * 1.96 * 1.2533 * 0.5 / 5, rel=0.4)  # a median's standard error, 1.2533 σ/√n


def test_a_runtime_that_takes_its_memory_once_has_it_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([500, 7])

    def clock(group: Any, *args: Any, **kwargs: Any) -> dict[str, Clocked]:
        time.sleep(0.001)
        return {"m": Clocked(peak=next(peaks))}

    monkeypatch.setattr(cost, "clock", clock)
    assert cost._timed({}, {}, {})[1]["m"].peak == 500


def figures(**latency: float) -> dict[str, Any]:
    models = {"teacher": runs.cost(0.8, 8e6, 10.0), "student distilled": runs.cost(0.6, 1e6, 4.0)}
    ratios = {"latency": latency or {"value": 2.5, "low": 2.0, "high": 3.0}, "bytes": 8.0}
    common = {"student": "student distilled", "names": ["teacher", "student distilled"], "unit": "token", "rounds": 9, "batch": 8}
    return common | {"positions": 128, "threads": 1, "models": models, "ratios": ratios}


def test_what_is_said_and_shown() -> None:
    note, picture, grid = Cost().blocks(figures())
    assert isinstance(note, Note)
    assert note.text == (
        "Beside the teacher the student is 2.5× (2.0 – 3.0) as fast for one row at a time, takes 12.5 % of its bytes, and has 75.0 % of "
        "its accuracy."
    )
    assert note.tone == "good"
    assert isinstance(picture, Picture)
    assert len(picture.figure) == 2
    assert "by latency student distilled, teacher" in picture.caption
    assert isinstance(grid, Grid)
    assert "RAPL" in grid.caption
    assert "9 rounds" in grid.caption
    slower = Cost().blocks(figures(value=0.5, low=0.4, high=0.6))[0]
    assert "slower, at 0.50× (0.40 – 0.60) of its speed" in slower.text
    assert slower.tone == "warning"


def test_an_export_that_runs_on_the_cpu_is_timed_there(tmp_path: Path) -> None:
    given: Evidence = runs.evidence(tmp_path)
    subjects = {**given.subjects, "onnx-int8": Subject(partial(slow, None), None, tmp_path / "teacher")}
    seen = replace(given.observed, models={**given.observed.models, "onnx-int8": given.observed.models["teacher"]})
    found = Cost().figures(replace(given, subjects=subjects, observed=seen))["models"]["onnx-int8"]
    assert (found["parameters"], found["device"], found["bytes_source"]) == (None, "cpu", "files")
    shown = figures() | {"models": {**figures()["models"], "onnx-int8": found}, "names": list(subjects)}
    grid = next(block for block in Cost().blocks(shown) if isinstance(block, Grid))
    assert grid.rows[-1][0] == "onnx-int8"
    assert grid.rows[-1][3] == ""  # nobody knows its parameters


def test_an_export_whose_runtime_is_elsewhere_has_its_quality_and_bytes_and_no_times(tmp_path: Path) -> None:
    given: Evidence = runs.evidence(tmp_path)
    asked: list[Any] = []
    target = lambda batch: (asked.append(batch), slow(None, batch))[1]
    subjects = {**given.subjects, "gguf-q8_0": Subject(target, None, tmp_path / "teacher", "llama.cpp")}
    seen = replace(given.observed, models={**given.observed.models, "gguf-q8_0": given.observed.models["teacher"]})
    figures = json.loads(json.dumps(Cost().figures(replace(given, subjects=subjects, observed=seen)), allow_nan=False))
    found, timed = figures["models"]["gguf-q8_0"], figures["models"]["student distilled"]
    assert not asked
    assert set(found) == {*timed, "runtime"}
    known = {name for name, value in found.items() if value is not None}
    assert known == {"disk_bytes", "bytes", "bytes_source", "accuracy", "loss", "runtime", "device"}
    assert found["bytes"] == bytes_of(tmp_path / "teacher")
    _, picture, grid = Cost().blocks(figures)
    assert isinstance(picture, Picture)
    assert isinstance(grid, Grid)
    assert [row[0] for row in grid.rows][::2] == ["teacher", "gguf-q8_0"], "it comes last"
    row = grid.rows[-1]
    assert [bool(cell) for cell in row] == [True, True, True, False, True, False, False, False, False, False, False]
    assert grid.caption.endswith(" What is for llama.cpp, which is not run here, is not timed.")
    assert "None" not in grid.caption
