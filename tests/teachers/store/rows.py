"""Rows of made-up teachers, for tests of the store."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.teachers.sparse import sparse_target
from distill.teachers.store import Header, StoredRow, create, finish, row_key, write_shard

Sets = list[dict[int, float]]


def header(**fields: Any) -> Header:
    values: dict[str, Any] = {
        "teacher": "org/teacher",
        "revision": None,
        "weights": "abcd",
        "tokenizer": "ef01",
        "num_classes": 50,
        "temperature": 1.0,
        "k": 5,
        "draws": 0,
        "bits": 8,
        "data": "2345",
        "rows": 7,
        "rows_per_shard": 3,
    }
    return Header(**(values | fields))


def target(of: Header, positions: int, seed: int = 0, spread: float = 3.0) -> StoredRow:
    """What a teacher with random logits says of a row."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(positions, of.num_classes, generator=generator) * spread
    ids, probs, tail = sparse_target(z, of.k, of.draws, of.temperature, generator)
    hidden: dict[str, NDArray[Any]] = {
        name: torch.randn(positions + 2, width, generator=generator).numpy() for name, width in of.hidden.items()
    }
    return StoredRow(ids.int().numpy(), probs.numpy(), tail.numpy(), hidden)


def key(row: int) -> bytes:
    return row_key([row, 1, 2], None, [True, True, False])


def sets(row: StoredRow) -> Sets:
    """Each position's classes with their probabilities, whatever their order."""
    return [{int(i): float(p) for i, p in zip(ids, probs, strict=True) if i >= 0} for ids, probs in zip(row.ids, row.probs, strict=True)]


def write(folder: Path, of: Header, shards: range | None = None) -> None:
    """Write shards of a store, all and finished where none are named; row i has the seed i."""
    create(folder, of, np.arange(of.num_classes))
    for shard in shards or range(of.num_shards):
        rows = of.rows_of(shard)
        write_shard(folder, shard, [key(i) for i in rows], (target(of, 4 + i % 3, i) for i in rows), of)
    if shards is None:
        finish(folder, {"val/loss": 1.5})
