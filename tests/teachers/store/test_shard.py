import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.teachers.store import create, finish, finished_shards, write_shard
from distill.teachers.store.shard import Shard, shard_path
from distill.types import DataError
from tests.disk import disk, largest_file
from tests.teachers.store.rows import header, key, target, write

OURS = header(rows=12, rows_per_shard=3)
ROWS = [target(OURS, 4, i) for i in range(12)]  # made here: a forked process must not run torch


def write_one(folder: Path, index: int) -> None:
    numbers = OURS.rows_of(index)
    write_shard(folder, index, [key(i) for i in numbers], [ROWS[i] for i in numbers], OURS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create(tmp_path / "store", OURS, np.arange(50))
    return tmp_path / "store"


def digests(folder: Path) -> dict[int, str]:
    """Of the shards that are trusted, each of which is looked at whole."""
    found = finished_shards(folder)
    for manifest in found.values():
        Shard(folder, manifest).check()
    return {index: manifest.sha256 for index, manifest in found.items()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[int, str]:
    create(tmp_path / "whole", OURS, np.arange(50))
    for index in range(4):
        write_one(tmp_path / "whole", index)
    return digests(tmp_path / "whole")


def test_a_shard_says_what_it_holds(folder: Path) -> None:
    write_one(folder, 2)
    (manifest,) = finished_shards(folder).values()
    assert (manifest.index, manifest.rows, manifest.positions) == (2, 3, 12)
    assert manifest.bytes == (folder / "shard-00002.bin").stat().st_size
    assert Shard(folder, manifest).keys.tobytes() == key(6) + key(7) + key(8)


def test_rows_must_be_those_of_the_shard(folder: Path) -> None:
    with pytest.raises(AssertionError, match="the rows of the shard"):
        write_shard(folder, 0, [key(0)], ROWS[:1], OURS)
    assert finished_shards(folder) == {}


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    write_one(folder, 0)
    path, random = shard_path(folder, 0), np.random.default_rng(0)
    (manifest,), good = finished_shards(folder).values(), path.read_bytes()
    for _ in range(200):
        damaged = bytearray(good)
        damaged[random.integers(len(good))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shard-00000\.bin' is damaged.*train\.py cache"):
            Shard(folder, manifest).row(random.integers(3))
    path.write_bytes(good)
    Shard(folder, manifest).row(0)


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_shard_is_none(left: int, folder: Path) -> None:
    write_one(folder, 0)
    path = shard_path(folder, 0)
    path.write_bytes(path.read_bytes()[:left])
    assert finished_shards(folder) == {}


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "of another shard", "of another store", "without its shard"])
def test_a_shard_without_its_manifest_is_none(damage: str, folder: Path, tmp_path: Path) -> None:
    write_one(folder, 0)
    write_one(folder, 1)
    manifest = folder / "shard-00000.json"
    if damage == "of another store":
        write(tmp_path / "other", header(rows=12, rows_per_shard=3, weights="9999"), range(1))
        for name in ("shard-00000.bin", "shard-00000.json"):
            (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    elif damage == "of another shard":
        manifest.write_bytes((folder / "shard-00001.json").read_bytes())
    elif damage == "without its shard":
        (folder / "shard-00000.bin").unlink()
    elif damage == "gone":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[: 0 if damage == "empty" else 80])
    assert list(finished_shards(folder)) == [1]


def test_a_full_disk_keeps_what_is_finished(folder: Path, whole: dict[int, str]) -> None:
    write_one(folder, 0)
    with largest_file(300), pytest.raises(DataError, match=r"shard-00001\.bin.*finished shards are kept: make room"):
        write_one(folder, 1)
    assert digests(folder) == {0: whole[0]}
    assert not list(folder.glob(".*")), "nothing is left beside it"
    write_one(folder, 1)
    assert digests(folder) == {0: whole[0], 1: whole[1]}


def test_a_disk_that_runs_full(tmp_path: Path) -> None:
    with disk(tmp_path / "small", "64k") as small:
        create(small, OURS, np.arange(50))
        write_one(small, 0)
        with suppress(OSError):
            (small / "other").write_bytes(b"x" * 2**17)
        with pytest.raises(DataError, match="No space left"):
            write_one(small, 1)
        with pytest.raises(DataError, match="No space left"):
            finish(small, {})
        assert list(digests(small)) == [0]
        (small / "other").unlink()
        write_one(small, 1)
        assert list(digests(small)) == [0, 1]


def in_fork(work: Any) -> Any:
    """Start work in a fork of this process, which has no pytest around it."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


STEPS = [("fsync", i) for i in range(7)] + [("replace", i) for i in range(4)]


@pytest.mark.parametrize(("call", "number"), STEPS)
def test_a_writer_killed_at_any_step_leaves_nothing_half_trusted(call: str, number: int, folder: Path, whole: dict[int, str]) -> None:
    def work() -> None:
        real, calls = getattr(os, call), iter(range(100))

        def die(*args: Any) -> None:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        setattr(os, call, die)
        write_one(folder, 0)
        write_one(folder, 1)

    process = in_fork(work)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = digests(folder)
    assert left.items() <= whole.items()
    assert len(left) < 2
    for index in set(range(4)) - set(left):
        write_one(folder, index)
    assert digests(folder) == whole


def test_a_writer_killed_at_any_moment_leaves_nothing_half_trusted(folder: Path, whole: dict[int, str]) -> None:
    def work() -> None:
        while True:
            for index in range(4):
                write_one(folder, index)

    random = np.random.default_rng(0)
    for _ in range(20):
        process = in_fork(work)
        wait_for(iter(lambda: bool(finished_shards(folder)), None))
        time.sleep(random.uniform(0, 0.03))  # the moment: anything may be going on
        os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        assert digests(folder).items() <= whole.items()
    for index in set(range(4)) - set(finished_shards(folder)):
        write_one(folder, index)
    assert digests(folder) == whole


def wait_for(conditions: Iterator[bool]) -> None:
    end = time.monotonic() + 120
    while not next(conditions):
        assert time.monotonic() < end, "the writer has written nothing"
