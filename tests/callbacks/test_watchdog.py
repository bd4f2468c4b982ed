"""Two ranks that train with DDP over gloo, and what becomes of one when the other is killed, stopped, or fails: all side by side."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

import distill.parallel  # noqa: F401  # for the names of the strategies
from distill.callbacks.watchdog import STATUS, Watchdog, _kill_children
from distill.types import ConfigError
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.ranks import _place, _server


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status (negative: a signal), how many seconds after the event, and what it wrote to stderr."""

    status: int
    seconds: float
    said: str


class Model(Tiny):
    def configure_model(self) -> None:
        """Nothing; FSDP2 asks for it."""


class Event(pl.Callback):
    """Something that happens to some ranks after the fifth step."""

    def __init__(self, ranks: tuple[int, ...], what: Callable[[], Any], folder: Path) -> None:
        self.ranks, self.what, self.folder = ranks, what, folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(0.02)
        if trainer.global_step == 5 and trainer.global_rank in self.ranks:
            (self.folder / "event").touch()
            self.what()


class Linger(pl.Callback):
    """A rank that takes its time to end."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(self.seconds if trainer.global_rank == self.rank else 0)

    on_fit_end = on_exception


def fail() -> None:
    raise ValueError("on purpose")


def nothing() -> None:
    pass


def hold_the_lock(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL: without letting go of Python's lock


def hit(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(100)


KILL, STOP = partial(hit, signal.SIGKILL), partial(hit, signal.SIGSTOP)
EVENTS: dict[str, tuple[tuple[int, ...], Callable[[], Any], Linger]] = {
    "0 killed": ((0,), KILL, Linger(0, 0)),
    "1 killed": ((1,), KILL, Linger(0, 0)),
    "0 stopped": ((0,), STOP, Linger(0, 0)),
    "1 stopped": ((1,), STOP, Linger(0, 0)),
    "1 stopped under zero2": ((1,), STOP, Linger(0, 0)),
    "0 stopped under fsdp2": ((0,), STOP, Linger(0, 0)),
    "1 failed": ((1,), fail, Linger(1, 100)),
    "all failed": ((0, 1), fail, Linger(0, 0)),
    "fine": ((1,), nothing, Linger(0, 4)),
    "held the lock for 20 s": ((1,), partial(hold_the_lock, 20), Linger(1, 0)),
}


def train(folder: Path, environ: dict[str, str], strategy: str, callbacks: list[pl.Callback]) -> None:
    """One rank."""
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(os.open(folder / f"stderr{environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    trainer(*callbacks, strategy=strategy, devices=2, max_steps=20, max_epochs=-1).fit(Model(), loader())
    os._exit(0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended | None]]:
    """How each rank ended; None for one that had to be killed."""
    ranks: dict[tuple[str, int], Any] = {}
    folders = {}
    for name, (of, what, linger) in EVENTS.items():
        folders[name] = folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        place, strategy = os.environ | _place(2), name.partition(" under ")[2] or "ddp"
        for rank in (0, 1):
            environ = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = (folder, environ, strategy, [Watchdog(), Event(of, what, folder), linger])
            ranks[name, rank] = _server().Process(target=train, args=given, daemon=True)
            ranks[name, rank].start()
    done = dict.fromkeys(ranks, 0.0)
    expected = len(ranks) - 5  # the stopped ones and the one that lingers do not end
    end = time.monotonic() + 240
    while sum(map(bool, done.values())) < expected and time.monotonic() < end:
        done = {key: when or (0.0 if ranks[key].exitcode is None else time.time()) for key, when in done.items()}
        time.sleep(0.1)
    results: dict[str, list[Ended | None]] = {}
    for (name, rank), when in done.items():
        ranks[name, rank].kill()
        folder = folders[name]
        seconds = when - (folder / "event").stat().st_mtime
        said = (folder / f"stderr{rank}").read_text()
        results.setdefault(name, []).append(Ended(ranks[name, rank].exitcode, seconds, said) if when else None)
    return results


def lines(rank: Ended) -> list[str]:
    return [line for line in rank.said.splitlines() if line.startswith("error: rank")]


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_rank_is_named_at_once(gone: int, ended: dict[str, list[Ended | None]]) -> None:
    other = ended[f"{gone} killed"][1 - gone]
    assert other is not None
    assert other.status > 0
    assert other.seconds < 30
    assert [line.split(": killed")[0] for line in lines(other)] == [f"error: rank {gone} on {where(gone)} has died"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVENTS if "stopped" in name])
def test_a_stopped_rank_ends_the_job_within_a_minute(name: str, ended: dict[str, list[Ended | None]]) -> None:
    gone = int(name[0])
    other = ended[name][1 - gone]
    assert other is not None
    assert other.status == STATUS
    assert 38 < other.seconds < 60
    (line,) = lines(other)
    assert line.startswith(f"error: rank {gone} on {where(gone)} has said nothing for 40 s: it is stopped")
    assert ended[name][gone] is None


@pytest.mark.slow
def test_a_failed_rank_ends_the_others_while_it_lingers(ended: dict[str, list[Ended | None]]) -> None:
    other, failed = ended["1 failed"]
    assert other is not None
    assert failed is None
    assert other.status == STATUS
    assert other.seconds < 30
    assert lines(other) == [f"error: rank 1 on {where(1)} has failed: see its output. The job ends; with --ckpt_path last it goes on"]


@pytest.mark.slow
def test_where_all_fail_alike_each_has_its_own_message(ended: dict[str, list[Ended | None]]) -> None:
    for rank in ended["all failed"]:
        assert rank is not None
        assert rank.status == 1
        assert lines(rank) == []
        assert "ValueError: on purpose" in rank.said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine", "held the lock for 20 s"])
def test_nobody_is_disturbed(name: str, ended: dict[str, list[Ended | None]]) -> None:
    for rank in ended[name]:
        assert rank is not None
        assert rank.status == 0
        assert lines(rank) == []


def where(rank: int) -> str:
    return "127.0.0.1" if rank == 0 else os.uname().nodename


def test_one_rank_alone_is_not_watched() -> None:
    watchdog = Watchdog()
    trainer(watchdog, max_steps=1).fit(Tiny(on_train=lambda: None), loader())
    assert watchdog._heartbeat is None


def test_patience_of_less_than_three_beats_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"watchdog_s must be at least 3, got 0\.5; 0 turns"):
        Watchdog(0.5)


def test_a_stopped_rank_that_lightning_started_does_not_stay() -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [subprocess.Popen(["sleep", "100"])]
    launcher.procs[0].send_signal(signal.SIGSTOP)
    _kill_children(SimpleNamespace(launcher=launcher))
    assert launcher.procs[0].wait(60) == -signal.SIGKILL
    _kill_children(SimpleNamespace(launcher=None))  # of srun and torchrun
