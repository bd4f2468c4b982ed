import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import PRELOADED, RankError, run_ranks


def identity(value: int) -> tuple[Any, ...]:
    missing = [name for name in PRELOADED if name not in sys.modules]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "MINE")
    return value, missing, os.getcwd(), *(os.environ.get(name) for name in names)


def total() -> Any:
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    value = torch.full((1000,), float(os.environ["RANK"]) + 1)
    distributed.all_reduce(value)
    return value


def lightning() -> tuple[int, int, int]:
    from tests.pair import trainer

    made = trainer(devices=2, strategy="ddp", max_steps=1)
    return made.global_rank, made.local_rank, made.world_size


def faulty(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise ValueError("seven is no temperature")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    wait_for_ever()


def wait_for_ever() -> None:
    while True:
        time.sleep(1)


def test_every_rank_knows_its_place_and_has_imported_everything_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "yes")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert run_ranks(identity, 2, 5) == [(5, [], here, str(rank), str(rank), "2", "1", "cpu", "yes") for rank in range(2)]


def test_ranks_talk_and_tensors_come_back() -> None:
    assert [value.sum().item() for value in run_ranks(total, 2)] == [3000.0, 3000.0]


def test_lightning_finds_the_ranks() -> None:
    assert run_ranks(lightning, 2) == [(0, 0, 2), (1, 1, 2)]


def test_the_traceback_of_the_rank_that_failed_is_shown_and_no_rank_is_left() -> None:
    with pytest.raises(RankError, match=r"rank 1 raised(.|\n)*in faulty(.|\n)*seven is no temperature"):
        run_ranks(faulty, 2, "raise")
    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
        run_ranks(faulty, 2, "die")


def test_a_rank_that_hangs_says_where() -> None:
    with pytest.raises(RankError, match=r"rank \[0, 1\] did not end in 2 s(.|\n)*wait_for_ever"):
        run_ranks(faulty, 2, "hang", timeout_s=2)
