"""Jobs run aside, give what they give, and keep nobody from ending."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from distill.teachers import workers
from distill.teachers.workers import Workers


def test_jobs_run_at_the_same_time_and_give_results_and_errors() -> None:
    pool, meet = Workers(2), threading.Barrier(2, timeout=120)

    def first() -> int:
        meet.wait()
        return 1

    def second() -> int:
        meet.wait()
        raise ValueError("two")

    one, two, three = pool.submit(first), pool.submit(second), pool.submit(lambda: 3)
    assert one.result(120) == 1
    with pytest.raises(ValueError, match="two"):
        two.result(120)
    assert three.result(120) == 3


def test_no_more_than_so_many_at_a_time() -> None:
    pool, running, most = Workers(2), [0], [0]
    lock = threading.Lock()

    def job() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    for future in [pool.submit(job) for _ in range(10)]:
        future.result(120)
    assert most[0] <= 2


def test_threads_end_with_their_owner() -> None:
    before = set(threading.enumerate())
    pool = Workers(3)
    pool.submit(int).result(120)
    ours = set(threading.enumerate()) - before
    assert len(ours) == 3
    del pool
    gc.collect()
    for thread in ours:
        thread.join(120)
        assert not thread.is_alive()


def test_a_process_that_ends_waits_for_no_job() -> None:
    # the file alone: the package would bring torch, and six seconds
    code = f"""
import runpy, threading
workers, started = runpy.run_path({workers.__file__!r})["Workers"](1), threading.Event()
workers.submit(lambda: (started.set(), threading.Event().wait()))
assert started.wait(60)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
