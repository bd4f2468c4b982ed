"""Signals are noted, and acted on where nothing is lost by stopping: `callbacks.preemption` says where.

No heavy import here: signals are noted from before the seconds that torch and Lightning take to import.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

NOTED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
END = b"\0"  # no signal has this number

_first = 0
_pid = 0  # of the process that notes signals, while one does


class Stopped(SystemExit):
    """Training has stopped as a signal asked. `code`, the exit status, is 128 + the signal's number: 130 after Ctrl-C."""


def received() -> int:
    """The number of the first signal that came, 0 while none has."""
    return _first


@contextmanager
def noted() -> Iterator[None]:
    """Within the block note SIGUSR1, SIGTERM and SIGINT instead of dying of them; a second SIGINT leaves at once, with exit status 130.

    The work is done by a thread that reads what Python's own C handler writes into a pipe: the main thread may hang in a collective of
    a job whose other ranks are gone, where no Python handler would run and Ctrl-C would do nothing.
    """
    global _first, _pid
    _first, _pid = 0, os.getpid()
    read, write = os.pipe()
    os.set_blocking(write, False)  # as set_wakeup_fd requires
    before: dict[int, Any] = {number: signal.signal(number, _wait_for_the_thread) for number in NOTED}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listener = Thread(target=_listen, args=(read,), daemon=True, name="signals")
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(write, END)
        listener.join()
        os.close(read)
        os.close(write)
        _pid = 0


@contextmanager
def at_once() -> Iterator[None]:
    """Within the block, and within `noted`, a signal ends what is done there by `Stopped`; one that was noted before does so at its start.

    For what follows training and can be done again later: there is no step whose end is to be waited for.
    """
    if _first:
        raise Stopped(128 + _first)
    wakeup = signal.set_wakeup_fd(-1)  # else the thread promises a checkpoint
    before: dict[int, Any] = {number: signal.signal(number, _stop) for number in NOTED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _stop(number: int, frame: Any) -> None:
    """Note the signal, for a run that this one is a part of, and leave."""
    global _first
    _first = number
    raise Stopped(128 + number)


def _wait_for_the_thread(number: int, frame: Any) -> None:
    """Do nothing: that there is a handler makes Python write to the pipe."""


def _listen(pipe: int) -> None:
    global _first
    interrupts = 0
    while END not in (came := os.read(pipe, 64)):
        for number in came:
            if number not in NOTED:  # the pipe gets every signal that has a Python handler
                continue
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                os._exit(128 + signal.SIGINT)
            if not _first:
                _first = number
                _say(number)


def _say(number: int) -> None:
    if any(os.environ.get(rank, "0") != "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        return  # one line a job is enough
    name, again = signal.Signals(number).name, "; Ctrl-C once more leaves at once" if number == signal.SIGINT else ""
    # not print: the main thread may hold the lock of stderr
    os.write(2, f"\n{name}: training stops at the end of this step, with a checkpoint{again}\n".encode())


def _let_children_be() -> None:
    """In a forked process: ignore what this process acts on. Slurm and a terminal signal every process of a job, readers included."""
    if _pid in (0, os.getpid()):
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how multiprocessing ends a child


os.register_at_fork(after_in_child=_let_children_be)


def in_reader(worker: int) -> None:
    """Let a DataLoader's worker survive a SIGTERM that is not its parent's; give it as `worker_init_fn`.

    Preemption under Slurm sends one to every process of the job. torch's own handler would end the worker, and with it the training
    that is about to save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True, name="signals").start()


def _end_with_the_parent(parent: int) -> None:
    while True:
        came = signal.sigwaitinfo({signal.SIGTERM})
        if came.si_pid in (parent, os.getpid()):
            os._exit(0)
