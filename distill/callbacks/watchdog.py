"""Ends a job whose ranks are not all alive, instead of letting the others wait for ever."""

import os
import secrets
import signal
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher  # the one launcher whose ranks nothing else ends

from distill.callbacks.heartbeat import Heartbeat, Lost
from distill.signals import Stopped
from distill.types import ConfigError

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE_S = 5.0

WHAT = {
    "silent": "has said nothing for {patience:g} s: it is stopped, swapping, or cut off from the network",
    "died": "has died: killed from outside, or a crash; see its output",
    "failed": "has failed: see its output",
}


class Watchdog(pl.Callback):
    """Ends the process, with status 75, when another rank is dead, has failed, or has been silent for `patience_s` seconds.

    Under any strategy; one rank alone is not watched. A rank is alive as long as one thread of its process gets a turn: any long
    phase is fine, be it reading, compiling or measuring, but one single call that holds Python's global lock for `patience_s` looks
    like a stop. So does a debugger that halts the process. A deadlock of living ranks is left to the process group's time-out.

    After a death or a failure the process has 5 s to end by itself, with its own message and cleaning up. The job's launcher (torchrun,
    srun, Lightning's) sees the status and ends or restarts the job.

    Args:
        patience_s: seconds, > 0.
        beat_s: seconds between two signs of life.

    Raises:
        ConfigError: `patience_s` is less than three beats.
    """

    def __init__(self, patience_s: float = 40.0, beat_s: float = 1.0) -> None:
        if patience_s < 3 * beat_s:
            raise ConfigError(f"watchdog_s must be at least {3 * beat_s:g}, got {patience_s:g}; 0 turns the watchdog off")
        self.patience_s, self.beat_s = patience_s, beat_s
        self._heartbeat: Heartbeat | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect the ranks; one that rank 0 cannot be reached from is not watched."""
        strategy = trainer.strategy
        if trainer.world_size < 2 or not isinstance(strategy, ParallelStrategy):
            return
        assert strategy.cluster_environment is not None, "there is one where there are several ranks"
        self._heartbeat = Heartbeat(trainer.global_rank, self.patience_s, lambda lost: self._end(lost, trainer), self.beat_s)
        token = secrets.token_hex(8)
        port = self._heartbeat.listen(token) if trainer.is_global_zero else 0
        host, port, token = strategy.broadcast((strategy.cluster_environment.main_address, port, token))
        if not trainer.is_global_zero:
            try:
                self._heartbeat.connect(host, port, token)
            except OSError as error:
                self._heartbeat = None
                _say(f"rank {trainer.global_rank} cannot reach {host}:{port} ({error}), so no one will notice if it stops")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no longer: from here on each rank goes its own way."""
        self._leave(failed=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others, who would wait; but where a signal stops all, each rank goes its own way, be it to requeue the job."""
        self._leave(failed=not isinstance(exception, Stopped))

    def _leave(self, failed: bool) -> None:
        if self._heartbeat is not None:
            self._heartbeat.end("failed" if failed else "bye")
            self._heartbeat = None

    def _end(self, lost: Lost, trainer: pl.Trainer) -> None:
        """Say who is lost and end this process; in the thread of the heartbeat."""
        heartbeat = self._heartbeat
        if heartbeat is None:
            return
        what = WHAT[lost.how].format(patience=self.patience_s)
        line = f"error: rank {lost.rank} on {lost.host} {what}. The job ends; with --ckpt_path last it goes on"
        says = trainer.is_global_zero or lost.rank == 0  # once is enough where there are a thousand
        if says and lost.how != "failed":
            _say(line)
        end = time.monotonic() + (0 if lost.how == "silent" else GRACE_S)
        while not heartbeat.ended:
            if time.monotonic() >= end:
                if says and lost.how == "failed":  # not before: where all fail alike each has its own, better message
                    _say(line)
                _kill_children(trainer.strategy)
                os._exit(STATUS)
            time.sleep(0.05)


def _kill_children(strategy: Any) -> None:
    # a stopped rank that Lightning started would stay, with its memory; torchrun ends its own, and srun does with --kill-on-bad-exit
    if isinstance(strategy.launcher, _SubprocessScriptLauncher):
        strategy.launcher.kill(signal.SIGKILL)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
