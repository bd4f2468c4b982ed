"""Shards: files of some hundred rows, published whole, proven to be whole, read at random."""

import hashlib
import itertools
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from distill.teachers.store.coding import Coder
from distill.teachers.store.header import MENDING, Header, identity, read_order
from distill.teachers.store.record import read_record, write_file, write_record
from distill.teachers.store.row import StoredRow
from distill.types import DataError


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a finished shard without reading it.

    Attributes:
        index: of the shard.
        rows: in it.
        positions: with a label, in all its rows.
        bytes: of the file.
        sha256: of the file.
        table_sha256: of the part that says where each row lies.
        store: `identity` of the store.
    """

    index: int
    rows: int
    positions: int
    bytes: int
    sha256: str
    table_sha256: str
    store: str


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{index:05}.bin"


def write_shard(folder: Path, index: int, keys: Sequence[bytes], rows: Iterable[StoredRow], header: Header) -> Manifest:
    """Write a shard, then its manifest; a process killed at any moment leaves no shard, or all of it. Any process may write any shard.

    Args:
        folder: of the store, after `create`.
        index: of the shard; a shard of the same index is replaced.
        keys: `row_key` of each row.
        rows: as many; read one by one.
        header: of the store.

    Raises:
        DataError: the disk refuses; the shards that are finished stay.
    """
    coder = Coder(header, read_order(folder))
    path = shard_path(folder, index)
    positions, blobs = 0, []
    for row in rows:
        positions += len(row.ids)
        blobs.append(coder.encode(row))
    assert len(blobs) == len(keys) == len(header.rows_of(index)), "the rows of the shard, each with its key"
    ends = np.cumsum([len(blob) for blob in blobs], dtype="<i8")
    table = b"".join(keys) + ends.tobytes()
    digest = hashlib.sha256()
    for blob in (*blobs, table):
        digest.update(blob)
    size = sum(map(len, blobs)) + len(table)
    table_digest = hashlib.sha256(memoryview(table)).hexdigest()
    manifest = Manifest(index, len(keys), positions, size, digest.hexdigest(), table_digest, identity(folder))
    try:
        path.with_suffix(".json").unlink(missing_ok=True)  # it would call the new shard damaged, should a kill come before the new manifest
        write_file(path, itertools.chain(blobs, [table]))
        write_record(path.with_suffix(".json"), asdict(manifest))
    except OSError as error:
        raise DataError(
            f"cannot write '{path}': {error.strerror}; the finished shards are kept: make room, then go on with the same command"
        ) from error
    return manifest


def finished_shards(folder: Path) -> dict[int, Manifest]:
    """The shards of a store that have a valid manifest of this store and the right size, by index; nothing else of them is read."""
    store, found = identity(folder), {}
    for path in sorted(folder.glob("shard-*.json")):
        try:
            manifest = Manifest(**read_record(path))
        except (DataError, FileNotFoundError, TypeError):
            continue
        shard = path.with_suffix(".bin")
        same = manifest.store == store and shard == shard_path(folder, manifest.index)
        if same and shard.is_file() and shard.stat().st_size == manifest.bytes:
            found[manifest.index] = manifest
    return found


class Shard:
    """A finished shard, mapped into memory. Its sha256 is checked when the first row is read.

    Args:
        folder: of the store.
        manifest: of the shard.

    Raises:
        DataError: its table of rows is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.path, self.manifest, self.checked = shard_path(folder, manifest.index), manifest, False
        found = self.path.stat()
        self._version = found.st_ino, found.st_mtime_ns
        table = self._data[manifest.bytes - manifest.rows * 24 :]
        if hashlib.sha256(table).hexdigest() != manifest.table_sha256:
            raise self._damaged()
        self.keys = np.frombuffer(table, "<u8", 2 * manifest.rows).reshape(-1, 2)
        self.ends = np.frombuffer(table, "<i8", offset=16 * manifest.rows)

    def check(self) -> None:
        """Compare all bytes with the manifest, once.

        Raises:
            DataError: they are others than were written.
        """
        if not self.checked:
            if hashlib.sha256(self._data).hexdigest() != self.manifest.sha256:
                raise self._damaged()
            self.checked = True

    def row(self, number: int) -> bytes:
        """The bytes of a row, checked."""
        self.check()
        return self._data[self.ends[number - 1] if number else 0 : self.ends[number]]

    @property
    def _data(self) -> mmap.mmap:
        return _mapped(self.path, self._version)

    def _damaged(self) -> DataError:
        return DataError(f"'{self.path}' is damaged: it has other bytes than were written; {MENDING}")


@lru_cache(maxsize=256)  # each holds a file open, of which a process may hold some 1,000
def _mapped(path: Path, version: tuple[int, int]) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
