"""The folders of runs."""

import multiprocessing
import time
from pathlib import Path

import pytest
from jsonargparse import Namespace
from pytorch_lightning.utilities import rank_zero_only

from distill import checkpoints, folders
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
    saved(run, 100)
    assert folders.resume_or_start(run) == ["--ckpt_path=last"]


def saved(run: Path, step: int) -> Path:
    target = run / "checkpoints" / checkpoints.name_of(step)
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.beside(target).write_bytes(b"weights")
    checkpoints.publish(checkpoints.beside(target), target)
    return target


def test_last_is_the_newest_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = (saved(tmp_path, step) for step in (1, 2, 3))
    assert folders.checkpoint(tmp_path, "last") == folders.newest(tmp_path) == str(three)
    assert capsys.readouterr().err == ""
    three.write_bytes(b"Weights")
    checkpoints.manifest_of(two).unlink()
    assert folders.checkpoint(tmp_path, "last") == str(one)
    assert capsys.readouterr().err.splitlines() == [
        f"damaged checkpoint {three}: step-00000003.ckpt has other bytes than were written; {one} is used instead",
        f"damaged checkpoint {two}: it has no step-00000002.ckpt.sha256, which is written last; {one} is used instead",
    ]
    one.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no checkpoint in '.*checkpoints'; give one, or `last`"):
        folders.checkpoint(tmp_path, "last")
    assert capsys.readouterr().err.count("no other is whole") == 3
    assert folders.newest(tmp_path / "nowhere") is None


def test_a_damaged_checkpoint_that_is_named_is_refused_and_one_without_manifest_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = saved(tmp_path, 1)
    assert folders.checkpoint(tmp_path, str(named)) == str(named)
    assert capsys.readouterr().err == ""
    named.write_bytes(b"Weights")
    with pytest.raises(ConfigError, match=r"step-00000001\.ckpt is damaged: step-00000001\.ckpt has other bytes than were written; take"):
        folders.checkpoint(tmp_path, str(named))
    copied = tmp_path / "copied.ckpt"
    copied.write_bytes(b"weights")
    assert folders.checkpoint(tmp_path, str(copied)) == str(copied)
    assert "copied.ckpt has no manifest copied.ckpt.sha256: used without knowing whether it is whole" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no checkpoint '.*nowhere\.ckpt'"):
        folders.checkpoint(tmp_path, str(tmp_path / "nowhere.ckpt"))


def test_only_the_first_rank_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(checkpoints, "verify", lambda path: pytest.fail("it was read"))
    assert folders.checkpoint(tmp_path, "last") == folders.checkpoint(tmp_path, str(newest)) == str(newest)
    (tmp_path / "checkpoints" / "latest").unlink()  # of a process that was killed just before
    assert folders.checkpoint(tmp_path, "last") == str(newest)


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
