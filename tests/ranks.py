"""Ranks for tests: processes forked from a server that has imported everything once, talking over gloo."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "deepspeed",
    "pytorch_lightning",
    "transformers",
    "torchao.quantization.qat",
    "distill.module",
    "distill.callbacks",
    "distill.parallel",
    "tests.pair",
]
# What must not come from the process or the machine that runs the tests: another cluster's ranks, another test's seed
FOREIGN = ("SLURM_", "PL_", "TORCHELASTIC_", "OMPI_")


class RankError(AssertionError):
    """A rank raised, died, or did not end in time; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(*args)` on every rank and give what each returns, in the order of the ranks.

    Lightning and DeepSpeed find the ranks in the environment; a `Trainer` wants `accelerator="cpu", devices=world_size`. The environment
    and the working directory are those of the caller. A rank stays alive until all are done, so that none loses its peer at the end.

    Args:
        function: a function of a module, by whose name the rank finds it.
        world_size: number of ranks.
        args: picklable.
        timeout_s: after so many seconds every rank says where it is and is killed.

    Raises:
        RankError: a rank raised, died, or did not end in time.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | _place(world_size)
        ranks: list[tuple[Any, Connection]] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                given = (theirs, own, Path(folder) / str(rank), timeout_s, function, args)
                process = context.Process(target=_rank, args=given, daemon=True)
                process.start()
                theirs.close()
                ranks.append((process, ours))
            results = _gather(ranks, Path(folder), timeout_s)
            for _, pipe in ranks:
                pipe.send(None)
            for process, _ in ranks:
                process.join(10)
            return results
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server takes its environment when it starts: torch reads the number of threads at import, DeepSpeed its accelerator
    with _environ({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()
    return context


@contextmanager
def _environ(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _place(world_size: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "NODE_RANK": "0", "GROUP_RANK": "0"}
    return {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _gather(ranks: list[tuple[Any, Connection]], folder: Path, timeout_s: float) -> list[Any]:
    """Wait for all; the first that fails ends it, for the others can only wait for it."""
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s + 2  # the ranks write where they are just before
    while waited := {pipe: i for i, (_, pipe) in enumerate(ranks) if i not in results}:
        ready = connection.wait(list(waited), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            where = "\n".join(f"rank {i}:\n{(folder / str(i)).read_text()}" for i in waited.values())
            raise RankError(f"rank {sorted(waited.values())} did not end in {timeout_s} s\n{where}")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            results[waited[pipe]] = _received(pipe, waited[pipe], ranks[waited[pipe]][0])
    return [results[i] for i in range(len(ranks))]


def _received(pipe: Connection, rank: int, process: Any) -> Any:
    try:
        fine, value = pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        process.join(10)
        raise RankError(f"rank {rank} died with exit code {process.exitcode}") from None
    if not fine:
        raise RankError(f"rank {rank} raised\n{value}")
    return value


def _rank(pipe: Connection, environ: dict[str, str], where: Path, timeout_s: float, function: Callable[..., Any], args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environ)
    with where.open("w") as file:
        faulthandler.dump_traceback_later(timeout_s, file=file)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        # pickle by itself: multiprocessing would pass tensors through shared memory, which ends with this process
        pipe.send_bytes(pickle.dumps(answer))
        faulthandler.cancel_dump_traceback_later()
    with suppress(EOFError, ConnectionError):
        pipe.recv()
    os._exit(0)  # past threads of gloo and hooks at exit that would wait for peers
