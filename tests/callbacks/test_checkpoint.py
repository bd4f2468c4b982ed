"""When checkpoints are saved, which stay, and that a run which goes on from one is the run that was never interrupted."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from distill import checkpoints
from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO
from distill.students.load import FromConfig
from distill.types import ConfigError, TrainingError
from tests import pair
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.disk import disk
from tests.ranks import run_ranks


def fit(folder: Path, *more: pl.Callback, every: int = 2, keep: int = 2, io: Any = None, path: Path | None = None, **options: Any) -> Any:
    """Train a linear layer; its data do not resume, but nothing here looks at them."""
    callbacks = [Checkpoints(folder, every, keep), *more]
    made = trainer(
        *callbacks, plugins=[io or AtomicCheckpointIO()], enable_checkpointing=True, **{"max_steps": 7, "max_epochs": -1, **options}
    )
    made.fit(Tiny(), loader(), ckpt_path=path)
    return made


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:13]) for path in checkpoints.candidates(folder)]


@pytest.mark.parametrize("io", [AtomicCheckpointIO, AsyncCheckpointIO])
@pytest.mark.parametrize(("keep", "stay"), [(1, [7]), (2, [7, 6]), (3, [7, 6, 4]), (9, [7, 6, 4, 2])])
def test_every_so_many_steps_and_the_end_of_which_the_newest_stay(tmp_path: Path, io: Any, keep: int, stay: list[int]) -> None:
    made = fit(tmp_path, keep=keep, io=io())
    assert [type(callback) for callback in made.checkpoint_callbacks] == [Checkpoints], "Lightning adds none of its own"
    assert steps(tmp_path) == stay
    assert not any(checkpoints.verify(path) for path in checkpoints.candidates(tmp_path))
    assert checkpoints.latest(tmp_path) == tmp_path / checkpoints.name_of(7)
    assert torch.load(tmp_path / checkpoints.name_of(7))["global_step"] == 7


def test_a_step_is_saved_once_whatever_the_window(tmp_path: Path) -> None:
    saved: list[int] = []

    class Watch(pl.Callback):
        def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
            saved.append(trainer.global_step)

    fit(tmp_path, Watch(), accumulate_grad_batches=2, max_steps=6)
    assert saved == [2, 4, 6]
    fit(tmp_path, Watch(), accumulate_grad_batches=2, max_steps=8, path=tmp_path / checkpoints.name_of(6))
    assert saved == [2, 4, 6, 8], "nor the one that was loaded"


@pytest.mark.parametrize(("keys", "said"), [({"every": 0}, "save_every must be at least 1, got 0"), ({"keep": 0}, "keep must be")])
def test_numbers_out_of_range(tmp_path: Path, keys: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Checkpoints(tmp_path, **keys)


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.ckpt.tmp").write_text("half")
    (tmp_path / ".step-00000005.ckpt.tmp").mkdir()
    fit(tmp_path)
    assert not list(tmp_path.glob(".*"))


class Draws(pl.Callback):
    """Draws from every generator before each micro-batch, as an augmentation would, and keeps what it drew, by optimizer step."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.drawn.setdefault(trainer.global_step, []).extend([random.gauss(0, 1), np.random.randn(), torch.randn(()).item()])


class SaveAt(pl.Callback):
    """Asks for a checkpoint after so many micro-batches, and ends training, as a preemption does."""

    def __init__(self, count: int) -> None:
        self.count, self.paths = count, list[Path]()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.count -= 1
        if self.count == 0:
            saver = next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))
            self.paths.append(saver.save(trainer))
            assert checkpoints.verify(self.paths[0]) is None, "published when it returns"
            trainer.should_stop = True


def distil(base: Path, folder: Path, *more: pl.Callback, io: Any = None, path: Path | None = None, **options: Any) -> Any:
    """Train the pair with dropout."""
    pl.seed_everything(1)
    module = pair.module(base, student=FromConfig(pair.STUDENT | {"attention_dropout": 0.2}))
    given = {"max_steps": 6, "accumulate_grad_batches": 3, "enable_checkpointing": True, **options}
    callbacks = [*more, Checkpoints(folder, every=100)]
    pair.trainer(callbacks=callbacks, plugins=[io or AtomicCheckpointIO()], **given).fit(
        module, pair.data(base, batch_size=2), ckpt_path=path
    )
    return module


@pytest.mark.parametrize("io", [AtomicCheckpointIO, AsyncCheckpointIO])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_a_save_on_demand_at_any_micro_batch_loses_nothing(tmp_path: Path, io: Any, count: int) -> None:
    pair.data(tmp_path)  # makes the teacher, which draws
    whole, drawn = distil(tmp_path, tmp_path / "whole", whole_draws := Draws()), whole_draws.drawn
    saved = SaveAt(count)
    distil(tmp_path, tmp_path / "a", saved, before := Draws(), io=io())
    assert saved.paths == [tmp_path / "a" / checkpoints.name_of(count // 3)]
    resumed = distil(tmp_path, tmp_path / "a", after := Draws(), io=io(), path=saved.paths[0])
    assert {**before.drawn, **after.drawn} == drawn, "the window that was left is drawn again"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_was_loaded_or_just_saved_is_not_written_again(tmp_path: Path) -> None:
    saved = SaveAt(6)
    distil(tmp_path, tmp_path / "a", saved)
    inode = saved.paths[0].stat().st_ino
    again = SaveAt(1)  # preempted again before the first step
    distil(tmp_path, tmp_path / "a", again, path=saved.paths[0])
    assert again.paths == saved.paths
    assert saved.paths[0].stat().st_ino == inode, "it may be the only one: it is not replaced"
    distil(tmp_path, tmp_path / "b", path=saved.paths[0], max_steps=3)
    assert steps(tmp_path / "b") == [3], "another run's checkpoint is another file"


@pytest.mark.parametrize("io", [AtomicCheckpointIO, AsyncCheckpointIO])
def test_a_disk_that_runs_full_ends_training_with_the_last_one_whole(tmp_path: Path, io: Any) -> None:
    pair.data(tmp_path)
    with disk(tmp_path / "disk", "256k") as small:
        fits = 200_000 // sizes(tmp_path)
        with pytest.raises(TrainingError, match=r"cannot write checkpoint '.*No space left on device; the one before, .*is as it was"):
            small_fit(tmp_path, small, io())
        found = checkpoints.newest_good(small)
        assert found is not None
        assert len(steps(small)) >= min(2, fits)
        shutil.copytree(small, tmp_path / "roomy")
    resumed = small_fit(tmp_path, tmp_path / "roomy", io(), path=tmp_path / "roomy" / found.name)
    whole = small_fit(tmp_path, tmp_path / "whole", io())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def sizes(base: Path) -> int:
    small_fit(base, base / "size", AtomicCheckpointIO(), max_steps=1)
    return (base / "size" / checkpoints.name_of(1)).stat().st_size


def small_fit(base: Path, folder: Path, io: Any, path: Path | None = None, max_steps: int = 12) -> Any:
    pl.seed_everything(1)
    module = pair.module(base)
    made = pair.trainer(max_steps=max_steps, enable_checkpointing=True, callbacks=[Checkpoints(folder, every=1, keep=50)], plugins=[io])
    made.fit(module, pair.data(base, batch_size=4), ckpt_path=path)
    return module


class Broken(pl.Callback):
    """Raises in the middle of training."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise ValueError("something else")


def test_what_is_being_written_is_finished_when_training_breaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="something else"):
        fit(tmp_path / "a", Broken(), io=AsyncCheckpointIO())
    assert steps(tmp_path / "a") == [2]
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match="something else"):
        fit(tmp_path / "b", Broken(), io=AsyncCheckpointIO())
    assert "error: cannot write checkpoint" in capsys.readouterr().err


def two_ranks(base: str, folder: str, path: str | None, max_steps: int) -> tuple[dict[int, list[float]], list[torch.Tensor], list[str]]:
    draws = Draws()
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    rank = int(os.environ["RANK"])
    random.seed(rank)
    module = distil(Path(base), Path(folder), draws, max_steps=max_steps, path=path and Path(path), **options)
    return draws.drawn, [p.detach().clone() for p in module.parameters()], sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.slow
def test_two_ranks_go_on_with_the_generators_of_each(tmp_path: Path) -> None:
    pair.data(tmp_path)
    whole = run_ranks(two_ranks, 2, str(tmp_path), str(tmp_path / "whole"), None, 4)
    half = run_ranks(two_ranks, 2, str(tmp_path), str(tmp_path / "half"), None, 2)
    path = tmp_path / "half" / checkpoints.name_of(2)
    rest = run_ranks(two_ranks, 2, str(tmp_path), str(tmp_path / "half"), str(path), 4)
    assert whole[0][0][2] != whole[1][0][2], "the ranks draw differently"
    for rank in range(2):
        assert half[rank][0] | rest[rank][0] == whole[rank][0]
        assert all(torch.equal(a, b) for a, b in zip(whole[rank][1], rest[rank][1], strict=True))
    assert rest[0][2] == sorted([*(n for s in (2, 4) for n in (checkpoints.name_of(s), f"{checkpoints.name_of(s)}.sha256")), "latest"])
