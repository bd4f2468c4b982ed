from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from distill.teachers.store import Store, finished_shards, shard, verify, write_shard
from distill.teachers.store.shard import shard_path
from distill.types import DataError
from tests.teachers.store.rows import header, key, sets, target, write

OURS = header(rows=7, rows_per_shard=3, bits=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, OURS)
    return tmp_path


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def test_rows_are_found_by_their_content_in_any_order(folder: Path) -> None:
    store = Store(folder)
    assert store.header == OURS
    assert store.measures == {"val/loss": 1.5}
    assert len(store) == 7
    for i in np.random.default_rng(0).permutation(7).tolist() * 2:
        assert key(i) in store
        assert sets(store[key(i)]) == sets(target(OURS, 4 + i % 3, i))


def test_what_is_not_there_is_said_so(folder: Path) -> None:
    store = Store(folder)
    assert key(99) not in store
    assert key(3)[:8] + b"another!" not in store
    assert "text" not in store
    with pytest.raises(KeyError):
        store[key(99)]


def test_rows_of_equal_content_are_found(tmp_path: Path) -> None:
    ours = header(rows=4, rows_per_shard=2, bits=32)
    write(tmp_path, ours)
    for index in range(2):
        write_shard(tmp_path, index, [key(8), key(index)], [target(ours, 4, 8), target(ours, 4, index)], ours)
    store = Store(tmp_path)
    assert len(store) == 4
    for i in (8, 0, 1):
        assert sets(store[key(i)]) == sets(target(ours, 4, i))


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    ours = header(rows=3, rows_per_shard=3, bits=32)
    write(tmp_path, ours)
    keys = [b"the same" + bytes([i] * 8) for i in (3, 1, 2)]
    write_shard(tmp_path, 0, keys, [target(ours, 4, i) for i in range(3)], ours)
    store = Store(tmp_path)
    for i in range(3):
        assert sets(store[keys[i]]) == sets(target(ours, 4, i))
    assert b"the same" + bytes(8) not in store


def test_a_store_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    write(tmp_path, OURS, range(2))
    with pytest.raises(DataError, match=r"2 of 3 shards, 'shard-00002\.bin' is missing.*train\.py cache"):
        Store(tmp_path)
    write(tmp_path, OURS, range(2, 3))
    with pytest.raises(DataError, match="is not finished"):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["header.json", "order.bin", "finished.json", "shard-00001.json"])
def test_a_damaged_byte_beside_the_shards_is_noticed_at_once(name: str, folder: Path) -> None:
    flip(folder / name, len((folder / name).read_bytes()) // 2)
    with pytest.raises(DataError):
        Store(folder)


def test_a_damaged_target_is_noticed_when_it_is_read(folder: Path) -> None:
    flip(shard_path(folder, 1), 5)
    store = Store(folder)
    assert sets(store[key(0)]) == sets(target(OURS, 4, 0))
    for i in (5, 3):
        with pytest.raises(DataError, match=r"shard-00001\.bin' is damaged"):
            store[key(i)]


def test_a_damaged_key_is_noticed_at_once(folder: Path) -> None:
    flip(shard_path(folder, 1), finished_shards(folder)[1].bytes - 60)
    with pytest.raises(DataError, match=r"shard-00001\.bin' is damaged"):
        Store(folder)


def test_a_shard_that_was_written_again_is_read_anew(folder: Path) -> None:
    flip(shard_path(folder, 1), 5)
    with pytest.raises(DataError):
        Store(folder)[key(3)]
    write(folder, OURS, range(1, 2))
    assert sets(Store(folder)[key(3)]) == sets(target(OURS, 4, 3))


def test_verifying_names_every_damage(folder: Path) -> None:
    assert list(verify(folder)) == []
    flip(shard_path(folder, 0), 5)
    shard_path(folder, 2).unlink()
    first, second = verify(folder)
    assert first[0] == 0
    assert "other bytes than were written" in first[1]
    assert second[0] == 2
    assert "shard-00002.bin' is missing" in second[1]


def test_threads_read_what_one_reads(folder: Path) -> None:
    store = Store(folder)
    order = np.random.default_rng(0).integers(0, 7, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda i: store[key(i)], order))
    wanted = [sets(target(OURS, 4 + i % 3, i)) for i in range(7)]
    assert all(sets(row) == wanted[i] for i, row in zip(order, rows, strict=True))


def test_only_so_many_shards_are_held_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_mapped", lru_cache(maxsize=1)(shard._mapped.__wrapped__))
    store = Store(folder)
    for i in (0, 3, 6, 1, 4, 0):
        assert sets(store[key(i)]) == sets(target(OURS, 4 + i % 3, i))
    assert shard._mapped.cache_info().currsize == 1
