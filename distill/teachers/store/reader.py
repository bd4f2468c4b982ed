"""A store, read at random by the content of a row."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.teachers.store.coding import Coder
from distill.teachers.store.header import MENDING, finished, read_header, read_order
from distill.teachers.store.row import StoredRow
from distill.teachers.store.shard import Shard, finished_shards, shard_path
from distill.types import DataError


class Store:
    """A finished store: `store[row_key(…)]` is what the teacher says of that row. Safe to read from several threads.

    Opening reads the header and where each row lies; the targets are mapped into memory, and each shard is checked against its sha256 when
    the first row of it is read.

    Args:
        folder: of the store.

    Attributes:
        header: what it holds.
        measures: of the teacher on validation rows.

    Raises:
        DataError: there is no store, it is not finished, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        measures = finished(self.folder)
        manifests = finished_shards(self.folder)
        if missing := [i for i in range(self.header.num_shards) if i not in manifests]:
            raise DataError(
                f"the store '{self.folder}' has {len(manifests)} of {self.header.num_shards} shards, "
                f"'{shard_path(self.folder, missing[0]).name}' is missing, damaged or not finished; {MENDING}"
            )
        if measures is None:
            raise DataError(f"the store '{self.folder}' is not finished; {MENDING}")
        self.measures = measures
        self.coder = Coder(self.header, read_order(self.folder))
        self.shards = [Shard(self.folder, manifests[i]) for i in range(self.header.num_shards)]
        keys = np.concatenate([shard.keys for shard in self.shards])
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        """Rows, those of equal content counted each."""
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self._find(key) is not None

    def __getitem__(self, key: bytes) -> StoredRow:
        """Read a row.

        Raises:
            KeyError: there is no row of that content.
            DataError: the shard it lies in is damaged.
        """
        row = self._find(key)
        if row is None:
            raise KeyError(key)
        shard, number = divmod(row, self.header.rows_per_shard)
        return self.coder.decode(self.shards[shard].row(number))

    def _find(self, key: bytes) -> int | None:
        first, second = np.frombuffer(key, "<u8")
        for i in range(np.searchsorted(self._keys[:, 0], first), len(self._keys)):
            if self._keys[i, 0] != first:
                return None
            if self._keys[i, 1] == second:
                return int(self._order[i])
        return None


def verify(folder: str | Path) -> Iterator[tuple[int, str]]:
    """Read every byte of a store.

    Yields:
        The index of a shard that is missing or damaged, to be written again, and what is wrong with it, for a person.

    Raises:
        DataError: there is no store, or its header or order is damaged.
    """
    folder = Path(folder)
    header = read_header(folder)
    read_order(folder)
    manifests = finished_shards(folder)
    for index in range(header.num_shards):
        path = shard_path(folder, index)
        if index not in manifests:
            yield index, f"'{path}' is missing, of another length than was written, or has no valid '{path.with_suffix('.json').name}'"
            continue
        try:
            Shard(folder, manifests[index]).check()
        except DataError as error:
            yield index, str(error)
