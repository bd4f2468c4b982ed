"""Hashes of contents: of plain values, for names of caches and splits, and of token rows, for reports."""

import hashlib
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from distill.types import IGNORE_INDEX


def of(*parts: str | bytes | int | float | bool | None) -> str:
    """Hash values to 16 hexadecimal digits, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace")
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def of_rows(rows: datasets.Dataset) -> str:
    """Hash the content of token rows, whatever file or chunks they lie in."""
    digest = hashlib.blake2b(digest_size=8)
    for table in _tables(rows):
        for name in sorted(table.column_names):
            column = table[name].combine_chunks()
            digest.update(name.encode())
            for part in (pc.list_value_length(column), pc.list_flatten(column)) if pa.types.is_nested(column.type) else (column,):
                digest.update(part.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def valid_positions(rows: datasets.Dataset) -> int:
    """Count the labels that are not −100."""
    return sum(pc.sum(pc.not_equal(pc.list_flatten(t["labels"].combine_chunks()), IGNORE_INDEX)).as_py() or 0 for t in _tables(rows))


def _tables(rows: datasets.Dataset) -> Iterator[Any]:
    # steps of a fixed number of rows, so that the hash does not depend on how the file is chunked
    return rows.with_format("arrow").iter(batch_size=1000)
