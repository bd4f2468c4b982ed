"""What reaches a W&B server, and what a server that is not there can do to a run: nothing."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from pytorch_lightning.loggers.logger import DummyLogger

from distill.callbacks.wandb import wandb_logger
from distill.report import publish as module
from distill.report.page import plots
from distill.report.page.blocks import Grid, Note, Picture
from distill.report.page.render import Chapter
from distill.report.publish import png, publish, publish_again, scalars
from tests.callbacks.test_wandb import alone, files_of, read_back, records, use_server  # noqa: F401
from tests.wandb_server import TAKES_ARTIFACTS, die, server

SECTIONS = {
    "quality": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}, "rows": 3, "why": "text", "whether": True, "broken": float("nan")},
    "training": {"curves": {"loss": [[1.0], [2.0]]}, "end": {"fell": 0.125}},
    "cost": {"missing": "why"},
}
SCALARS = {
    "report/quality/accuracy": 0.5,
    "report/quality/accuracy_low": 0.25,
    "report/quality/accuracy_high": 0.75,
    "report/quality/rows": 3.0,
    "report/training/end/fell": 0.125,
}


def chapters() -> list[Chapter]:
    figures = []
    for end in range(2):  # wandb names a picture after its content
        figure, (axes,) = plots.new()
        axes.plot([0, 1], [0, end])
        figures.append(figure)
    table = Grid(["", "accuracy"], [["teacher", "50.0 %"], ["student", "40.0 %"]], "caption")
    return [Chapter("quality", "Quality", "How good?", [Note("x"), table, Picture(figures, "a line", "how to read it")])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    (made / "report.html").write_text("<!DOCTYPE html><title>the page</title>")
    (made / "report.json").write_text(json.dumps({"a": 1}))
    return made


def show(logger: Any, folder: Path) -> bool:
    return publish(logger, folder, {"sections": SECTIONS}, chapters())


def test_numbers_by_their_path() -> None:
    assert dict(scalars(SECTIONS)) == SCALARS
    many = {"quality": {str(i): i for i in range(5000)}}
    assert len(dict(scalars(many))) == module.SCALARS


def test_a_picture_is_drawn_on_white() -> None:
    drawn = png(chapters()[0].blocks[2].figure[0])
    assert drawn.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255)
    assert min(drawn.size) > 200


def test_all_of_it_is_on_disk_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger: Any = wandb_logger("p", folder, {})
    assert show(logger, folder)
    logger.finalize("success")
    home = Path(logger.experiment.settings.sync_dir)
    summary = read_back(home)["summary"]
    assert {key: summary.get(key) for key in SCALARS} == SCALARS
    media = sorted(path.relative_to(home / "files" / "media").parts[0] for path in (home / "files" / "media").rglob("*") if path.is_file())
    assert media == ["html", "images", "images", "table"]
    (page,) = (home / "files" / "media").rglob("*.html")
    assert page.read_text() == (folder / "report.html").read_text()
    (table,) = (home / "files" / "media").rglob("*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["column 1", "accuracy"], "data": [["teacher", "50.0 %"], ["student", "40.0 %"]]}
    artifacts = [record for record in records(home) if record["type"] == "artifact" and record["artifact"]["type"] == "report"]
    assert [sorted(files_of(record)) for record in artifacts] == [["report.html", "report.json"]]
    assert artifacts[0]["artifact"]["name"] == f"report-{logger.version}"


def test_an_old_run_goes_on_by_its_id(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "wandb_id").write_text("abc123")
    with server(answers=TAKES_ARTIFACTS) as (port, received):
        use_server(monkeypatch, port)
        assert publish_again("p", folder, {"sections": SECTIONS}, chapters())
    starts = [json.loads(body)["variables"]["name"] for body in received if "UpsertBucket" in body]
    assert set(starts) == {"abc123"}
    asked = [name for body in received for name in ("CreateArtifact ", "CommitArtifact ") if name in body]
    assert "CommitArtifact " in asked
    assert any(body.startswith("PUT /report.html <!DOCTYPE html>") for body in received)
    assert any(body.startswith('PUT /report.json {"a": 1}') for body in received)
    sent = "".join(received)
    assert "report/quality/accuracy_low" in sent
    assert not re.search("^WANDB", capsys.readouterr().err, re.MULTILINE)


def test_a_run_that_was_not_tracked_becomes_one(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert publish_again("p", folder, {"sections": SECTIONS}, chapters())
    assert "was not tracked" in capsys.readouterr().err
    assert (folder / "wandb_id").read_text()


def test_a_server_that_is_away_costs_seconds_and_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 2.0)
    with server() as (port, _):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", folder, {}, finish_timeout_s=2)
        die(port)
        start = time.monotonic()
        assert not show(logger, folder)
        logger.finalize("success")
        wandb.teardown()
        assert time.monotonic() - start < 15
    assert re.search(rf"^WANDB DID NOT TAKE THE REPORT: .*\. It is in {folder / 'report.html'}$", capsys.readouterr().err, re.MULTILINE)


def test_a_report_that_is_not_there_is_a_line_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger: Any = wandb_logger("p", folder, {})
    (folder / "report.html").unlink()
    assert not show(logger, folder)
    assert "WANDB DID NOT TAKE THE REPORT: [Errno 2]" in capsys.readouterr().err
    logger.log_metrics({"loss": 1.0}, 1)  # and the run goes on
    logger.finalize("success")
    assert read_back(Path(logger.experiment.settings.sync_dir))["summary"]["loss"] == 1.0


def test_without_a_wandb_logger_nothing_happens(folder: Path) -> None:
    assert not publish(DummyLogger(), folder, {"sections": SECTIONS}, chapters())
