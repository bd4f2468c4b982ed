"""A disk that refuses on one rank: every rank says so, none waits."""

import errno
import os
from pathlib import Path

import pytest
import torch

from distill.types import TrainingError
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
