from pathlib import Path

import numpy as np
import pytest

from distill.teachers.store.record import read_record, write_file, write_record
from distill.types import DataError
from tests.disk import disk, largest_file

FIELDS = {"name": "größer", "numbers": [1, 2.5, None], "inner": {"b": 1, "a": 2}}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", FIELDS)
    assert read_record(tmp_path / "a.json") == FIELDS
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path, random = tmp_path / "a.json", np.random.default_rng(0)
    write_record(path, FIELDS)
    whole = path.read_bytes()
    messages = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= random.integers(1, 256)
        path.write_bytes(damaged)
        try:
            assert read_record(path) == FIELDS  # another white space
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 0.9 * len(whole)
    assert all("a.json" in message for message in messages)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b'{"blake2b": 1}', b"\xff"])
def test_what_is_no_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_record(tmp_path / "a.json")


def test_a_refused_write_leaves_the_former_file(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", FIELDS)
    with largest_file(100), pytest.raises(OSError):
        write_file(tmp_path / "a.json", [b"x" * 90, b"y" * 90])
    assert read_record(tmp_path / "a.json") == FIELDS
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_former_file(tmp_path: Path) -> None:
    with disk(tmp_path / "small", "64k") as folder:
        write_record(folder / "a.json", FIELDS)
        with pytest.raises(OSError):
            write_file(folder / "a.json", (b"x" * 8192 for _ in range(20)))
        assert read_record(folder / "a.json") == FIELDS
        assert [path.name for path in folder.iterdir()] == ["a.json"]
