"""The folders of runs."""

import multiprocessing
import time
from pathlib import Path

import pytest
from jsonargparse import Namespace

from distill import folders
from distill.types import ConfigError


def named(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for key in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "DISTILL_STARTED"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return folders.default_name(Namespace(config=["configs/kd_llama.yaml"]))


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(monkeypatch, SLURM_JOB_ID="77", SLURM_STEP_ID="0") == "kd_llama-77", "the same after a requeue"
    assert named(monkeypatch, SLURM_JOB_ID="77", SLURM_STEP_ID="1") == "kd_llama-77.1", "another srun of one allocation is another run"
    assert named(monkeypatch, TORCHELASTIC_RUN_ID="abc") == "kd_llama-abc"
    assert named(monkeypatch, DISTILL_STARTED="20260102-030405") == "kd_llama-20260102-030405", "ranks started by this process share it"


def test_an_interrupted_run_goes_on_or_is_moved_aside(tmp_path: Path) -> None:
    run = tmp_path / "a"
    assert folders.resume_or_start(run) == []
    run.mkdir()
    (run / "precious").write_text("x")
    assert folders.resume_or_start(run) == []
    assert not run.exists()
    assert (next(tmp_path.glob("a.interrupted-*")) / "precious").read_text() == "x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_text("x")
    assert folders.resume_or_start(run) == ["--ckpt_path=last"]


def test_the_same_configuration_but_for_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: a-alone\nalone: true\ntrainer: {max_steps: 3}\n")
    folders.check_same(tmp_path, "name: a\nalone: false\ntrainer: {max_steps: 3}\n")
    with pytest.raises(ConfigError, match="`trainer` differs"):
        folders.check_same(tmp_path, "name: a\ntrainer: {max_steps: 4}\n")


def test_a_recipe_needs_a_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: made\nruns: elsewhere\n")
    assert folders.of_recipe(str(tmp_path / "r.yaml")) == Path("elsewhere/made")
    (tmp_path / "r.yaml").write_text("trainer: {}\n")
    with pytest.raises(ConfigError, match="has no `name`"):
        folders.of_recipe(str(tmp_path / "r.yaml"))


def _hold(folder: Path, order: Path, word: str) -> None:
    with folders.locked(folder):
        with order.open("a") as file:
            file.write(word)
        time.sleep(0.2)
        with order.open("a") as file:
            file.write(word)


def test_one_process_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "t", tmp_path / "order", w)) for w in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "order").read_text() in ("aabb", "bbaa")
