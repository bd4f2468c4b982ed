"""Threads that do jobs aside, e.g. wait for a server while the student trains."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")
Job = tuple[Future[Any], Callable[[], Any]] | None


class Workers:
    """A few threads, started by the first job, that end with this object.

    Not a `ThreadPoolExecutor`, which keeps a process that wants to end, e.g. by Ctrl-C, until every job is through: a request that is
    sent again and again takes minutes.

    Args:
        count: jobs at a time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._started = False

    def submit(self, job: Callable[[], Result]) -> "Future[Result]":
        """Queue a job; what it gives or raises is the future's."""
        if not self._started:
            self._started = True
            for _ in range(self.count):
                threading.Thread(target=_work, args=(self._jobs,), daemon=True).start()
            weakref.finalize(self, _end, self._jobs, self.count)
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future


def _work(jobs: "queue.SimpleQueue[Job]") -> None:
    while item := jobs.get():
        future, job = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(job())
        except BaseException as error:  # it belongs to whoever asks for the result
            future.set_exception(error)
        del item, future, job  # nothing is held while there is nothing to do


def _end(jobs: "queue.SimpleQueue[Job]", count: int) -> None:
    for _ in range(count):
        jobs.put(None)
