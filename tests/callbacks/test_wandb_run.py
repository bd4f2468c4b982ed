"""W&B through the command: what a run of the framework tells it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from distill.cli import main
from tests import pair
from tests.test_command import config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher, data and `kd.yaml`."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    given = config()
    given["trainer"]["log_every_n_steps"] = 1
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(given))
    return tmp_path


def fit(*args: str) -> int:
    wandb.teardown()  # what another file's tests have left running works in another folder, and paths of a run are relative
    done = main(["fit", "--config", "kd.yaml", "--name=a", "--logger=wandb", *args])
    wandb.teardown()
    return done


def records(run: Path) -> list[list[dict[str, Any]]]:
    """The records of each start of a run, in order."""
    folders = sorted((run / "wandb").glob("offline-run-*"))
    return [[json.loads(line) for line in _inspected(folder).splitlines()] for folder in folders]


def _inspected(folder: Path) -> str:
    """What W&B reads out of an offline run; its own process may still be closing the file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    end = time.monotonic() + 60
    while (done := subprocess.run(command, check=False, capture_output=True, text=True)).returncode:
        assert time.monotonic() < end, done.stderr
        time.sleep(0.5)
    return done.stdout


def test_every_line_of_metrics_with_config_and_fingerprints(here: Path) -> None:
    assert fit("--wandb_artifact=true") == 0
    (found,) = records(here / "runs" / "a")
    lines = [json.loads(line) for line in (here / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    assert len(rows) == len(lines)
    for line, row in zip(lines, rows, strict=True):
        assert {name: row[name] for name in line.keys() - {"step", "time"}} == {k: v for k, v in line.items() if k not in ("step", "time")}
        assert row["trainer/global_step"] == line["step"]
    assert {"train/loss", "train/ce", "train/kd", "train/grad_norm", "train/lr"} <= rows[0].keys()
    (run,) = [record["run"] for record in found if record["type"] == "run"]
    assert run["run_id"] == (here / "runs" / "a" / "wandb_id").read_text()
    shown = run["config"]["update"]
    report = json.loads((here / "runs" / "a" / "report.json").read_text())
    assert shown["fingerprints"] == report["fingerprints"]
    assert set(report["fingerprints"]) == {"version", "commit", "code", "data"}
    assert shown["model"]["losses"]["kd"]["init_args"]["temperature"] == 2.0
    assert any(record["type"] == "artifact" for record in found)


def test_one_run_on_the_server_however_often_it_is_started(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "runs" / "a").mkdir(parents=True)  # of a start that was killed before its first checkpoint
    (here / "runs" / "a" / "wandb_id").write_text("thefirst")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit("--trainer.max_steps=2") == 0
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert fit("--trainer.max_steps=4", "--ckpt_path=last") == 0
    runs = [record["run"]["run_id"] for found in records(here / "runs" / "a") for record in found if record["type"] == "run"]
    assert runs == ["thefirst", "thefirst"]


def test_a_run_that_begins_with_anothers_checkpoint_is_another(here: Path) -> None:
    assert fit("--trainer.max_steps=2") == 0
    (checkpoint,) = (here / "runs" / "a" / "checkpoints").glob("*.ckpt")
    assert fit("--trainer.max_steps=4", f"--ckpt_path={checkpoint}", "--name=b") == 0
    one, other = ((here / "runs" / name / "wandb_id").read_text() for name in "ab")
    assert one != other
