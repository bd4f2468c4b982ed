"""Signals are noted from before the imports; Ctrl-C twice leaves whatever the process hangs in."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from distill import signals

ROOT = Path(__file__).parents[1]
HANGS = """
import ctypes
from distill import signals
with signals.noted():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("hangs", flush=True)
    libc.pthread_mutex_lock(mutex)  # as in a collective that never ends: no Python handler runs any more
"""


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def noted() -> Iterator[None]:
    with signals.noted():
        yield


def test_neither_signals_nor_submit_imports_anything_heavy() -> None:
    code = "import sys, distill.signals, distill.launch; sys.exit(bool({'torch', 'yaml', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_first_signal_counts_and_the_handlers_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in signals.NOTED}
    with signals.noted():
        assert signals.received() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(signals.received)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert signals.received() == signal.SIGUSR1
    assert {number: signal.getsignal(number) for number in signals.NOTED} == before
    assert capfd.readouterr().err == "\nSIGUSR1: training stops at the end of this step, with a checkpoint\n"
    with signals.noted():
        assert signals.received() == 0


def test_other_ranks_say_nothing(noted: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(signals.received)
    assert capfd.readouterr().err == ""


def test_a_second_ctrl_c_leaves_at_once_even_what_hangs() -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert "Ctrl-C once more leaves at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_forked_child_neither_dies_nor_tells_its_parent(noted: None) -> None:
    child = os.fork()
    if child == 0:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(7 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    time.sleep(0.1)
    assert signals.received() == 0


class Pids(Dataset):
    """Every row is the process that reads it; a number, for a tensor's memory would have to be fetched from a worker that may be gone."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def kill_from_outside(pid: int) -> None:
    subprocess.run(["kill", "-TERM", str(pid)], check=True)


def test_a_reader_survives_the_sigterm_that_slurm_sends_to_all_and_not_its_parents() -> None:
    # all must arrive while the worker is at work: two rows ahead, of 1000
    rows = iter(DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=signals.in_reader))
    worker = next(rows)
    kill_from_outside(worker)
    assert [next(rows) for _ in range(20)] == [worker] * 20
    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # noqa: PT012  # torch raises wherever this process hears of the death
        os.kill(worker, signal.SIGTERM)
        list(rows)


def test_torchs_own_reader_dies_of_it() -> None:
    rows = iter(DataLoader(Pids(), batch_size=None, num_workers=1))
    with pytest.raises(RuntimeError, match=r"killed by signal: Terminated|exited unexpectedly"):  # noqa: PT012  # as above
        kill_from_outside(next(rows))
        list(rows)
