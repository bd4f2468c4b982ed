"""Folders that are published while training goes on: never early, and none before the one before."""

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy

from distill import checkpoints
from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.checkpoint_io import AsyncCheckpointIO
from distill.parallel import folder as folders
from distill.types import ConfigError, TrainingError
from tests import pair
from tests.parallel import runs
from tests.ranks import RankError, run_ranks


def save(strategy: Any, path: Path) -> None:
    with folders.published(strategy, path, folders.Parts("ZeRO-2", 2, [])) as here:
        (here / "x.pt").write_bytes(path.name.encode())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds the second checkpoint back after its renaming and before its manifest, until it is set."""
    event, write = threading.Event(), checkpoints._write

    def wait(path: Path, text: str) -> None:
        if path.name.startswith("step-00000002"):
            event.wait(120)
        write(path, text)

    monkeypatch.setattr(checkpoints, "_write", wait)
    return event


def test_a_folder_is_no_checkpoint_until_its_manifest_is_there_and_the_next_save_waits(held: threading.Event, tmp_path: Path) -> None:
    strategy = pair.trainer(plugins=[AsyncCheckpointIO()]).strategy
    one, two, three = (tmp_path / checkpoints.name_of(step) for step in (1, 2, 3))
    save(strategy, one)
    save(strategy, two)
    assert checkpoints.newest_good(tmp_path) == checkpoints.latest(tmp_path) == one, "one was waited for, two is under way"
    third = threading.Thread(target=save, args=(strategy, three))
    third.start()
    third.join(0.5)
    assert not checkpoints.beside(three).exists(), "it waits for two, and writes nothing"
    held.set()
    third.join(120)
    strategy.checkpoint_io.teardown()
    assert [checkpoints.verify(path) for path in (one, two, three)] == [None] * 3
    assert checkpoints.latest(tmp_path) == three


def test_a_failure_is_raised_once_by_whatever_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = pair.trainer(plugins=[AsyncCheckpointIO()]).strategy
    one, two = (tmp_path / checkpoints.name_of(step) for step in (1, 2))

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(checkpoints, "_write", refuse)
        save(strategy, one)
        strategy.checkpoint_io._pending.exception()  # let it come to its end
    said = f"cannot save the checkpoint '{one}': No space left on device"
    with pytest.raises(TrainingError) as raised:
        save(strategy, two)
    assert str(raised.value) == said
    assert checkpoints.newest_good(tmp_path) is None
    save(strategy, two)
    strategy.checkpoint_io.teardown()
    assert checkpoints.newest_good(tmp_path) == two


# ---- on ranks


HELD = threading.Event()  # of a rank


class Losses(runs.Record):
    """Writes every step's loss down at once; kills the process after a step."""

    def __init__(self, file: Path, kill_at: int) -> None:
        super().__init__()
        self.file, self.kill_at = file, kill_at

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(self.losses))
            if trainer.global_step == self.kill_at:
                assert HELD.wait(120), "the thread has come to the manifest"
                os.kill(os.getpid(), signal.SIGKILL)


def leg(folder: Path, spec: str, path: Path | None, kill_at: int) -> list[float]:
    """Train three steps with a checkpoint after each; where it is to be killed, the second one is never published."""
    write, losses = checkpoints._write, Losses(folder / f"{spec}.json", kill_at)
    losses.start = 0 if path is None else 1

    def stuck(path: Path, text: str) -> None:
        if kill_at and path.name.startswith("step-00000002"):
            HELD.set()
            threading.Event().wait()
        write(path, text)

    checkpoints._write = stuck
    saver = Checkpoints(folder / spec, every=1, keep=9)
    saver._save = lambda trainer, again=False: None if kill_at and trainer.global_step > 2 else Checkpoints._save(saver, trainer, again)  # type: ignore[method-assign,assignment,return-value]
    trainer = runs.trainer(spec, 2, max_steps=3, callbacks=[losses, saver], plugins=[AsyncCheckpointIO()], enable_checkpointing=True)
    trainer.fit(runs.rich(folder), datamodule=pair.data(folder, batch_size=2, seed=1), ckpt_path=path)
    return losses.losses


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ZeRO-2", "fsdp2"])
def test_training_goes_on_meanwhile_and_a_kill_leaves_the_one_before(spec: str, folder: Path) -> None:
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(leg, 2, folder, spec, None, 3)
    before = json.loads((folder / f"{spec}.json").read_text())
    assert len(before) == 3, "the third step was done while the second's checkpoint was held"
    one, two = (folder / spec / checkpoints.name_of(step) for step in (1, 2))
    assert two.is_dir()
    assert checkpoints.newest_good(folder / spec) == one
    assert run_ranks(leg, 2, folder, spec, one, 0)[0] == before[1:]
    assert checkpoints.newest_good(folder / spec) == folder / spec / checkpoints.name_of(3)


# ---- work of rank 0 alone


def slow(folder: Path, takes_s: float, fails: bool) -> tuple[str, float]:
    """Rank 0 takes longer than the group's time-out."""
    strategy = pair.trainer(devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=4))).strategy
    strategy._lightning_module = pair.DistillModule.__new__(pair.DistillModule)
    strategy.setup_environment()
    start = time.monotonic()

    def work() -> None:
        time.sleep(takes_s)
        if fails:
            raise OSError(28, "No space left on device")

    try:
        folders.alone(strategy, folder / ".marker.tmp", work, "cannot convert it", ConfigError)
    except ConfigError as error:
        return str(error), time.monotonic() - start
    return "done", time.monotonic() - start


@pytest.mark.parametrize(("fails", "said"), [(False, "done"), (True, "cannot convert it: No space left on device")])
def test_the_others_wait_longer_than_the_group_would_let_them(fails: bool, said: str, tmp_path: Path) -> None:
    for message, seconds in run_ranks(slow, 2, tmp_path, 7.0, fails):
        assert message == said
        assert seconds > 6
    assert not list(tmp_path.iterdir())
