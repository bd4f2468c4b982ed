"""A disk that refuses on one rank: every rank says so, none waits."""

import errno
import os
from pathlib import Path

import pytest
import torch

from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.checkpoint_io import AsyncCheckpointIO
from distill.types import ConfigError, TrainingError
from tests import pair
from tests.ranks import run_ranks


def _save_on_a_full_disk(folder: str, strategy: str) -> str:
    path = Path(folder)
    module, trainer = pair.module(path), pair.trainer(max_steps=1, devices=2, strategy=strategy)
    trainer.fit(module, pair.data(path, batch_size=2))
    if os.environ["RANK"] == "1":
        torch.save = _refuse  # what DeepSpeed writes with
        torch.distributed.checkpoint.filesystem._write_item = _refuse  # what FSDP2 writes with
    try:
        trainer.save_checkpoint(path / "step-00000001.ckpt")
    except TrainingError as error:
        return str(error)
    return "saved"


def _refuse(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_a_write_that_fails_on_one_rank_ends_on_all(tmp_path: Path, strategy: str) -> None:
    pair.data(tmp_path)
    said = run_ranks(_save_on_a_full_disk, 2, str(tmp_path), strategy, timeout_s=60)
    for line in said:
        assert line.startswith(f"cannot save the checkpoint '{tmp_path / 'step-00000001.ckpt'}': ")
        assert "No space left on device" in line
    assert not (tmp_path / "step-00000001.ckpt").exists()


def _save_async(folder: str, strategy: str) -> str:
    path = Path(folder)
    trainer = pair.trainer(
        max_steps=1,
        devices=1,
        strategy=strategy,
        enable_checkpointing=True,
        callbacks=[Checkpoints(path / "checkpoints")],
        plugins=[AsyncCheckpointIO()],
    )
    with pytest.raises(ConfigError) as error:
        trainer.fit(pair.module(path), pair.data(path, batch_size=2))
    return str(error.value)


def test_saving_folders_meanwhile_is_refused(tmp_path: Path) -> None:
    pair.data(tmp_path)
    assert "save_async writes checkpoints that are one file" in run_ranks(_save_async, 1, str(tmp_path), "zero2")[0]
