"""A callback of a user's own, for the jobs of these tests: one rank is late, and what each rank did is written down."""

import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from distill import signals


class Late(pl.Callback):
    """In a job's first run, hold a rank in the midst of a step until a signal has come, and `seconds` more.

    Args:
        folder: where `ready-JOB` says that the rank is held, by its process id, and `stopped-JOB-RANK` at which step the rank stopped.
        rank: which is held.
        step: in which.
        seconds: for how long after the signal.
    """

    def __init__(self, folder: str, rank: int, step: int, seconds: float) -> None:
        self.folder, self.rank, self.step, self.seconds = Path(folder), rank, step, seconds
        self.job, self.first = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0") == "0"

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        if self.first and trainer.global_step == self.step and trainer.global_rank == self.rank:
            (self.folder / f"ready-{self.job}").write_text(str(os.getpid()))
            end = time.monotonic() + 300
            while not signals.received() and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(self.seconds)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        (self.folder / f"stopped-{self.job}-{trainer.global_rank}").write_text(f"{trainer.global_step} {exception!r}")
