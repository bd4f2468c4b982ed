"""What is kept in a store of a teacher's outputs for a batch: row by row, a chunk of positions at a time."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distill.losses.chunked import chunk_size, chunks
from distill.losses.support import Distribution
from distill.losses.target import Chunk, chunked
from distill.teachers.cached import CachedTeacher
from distill.teachers.padded import Places
from distill.teachers.sparse import Sparse, sparse_target
from distill.teachers.store import StoredRow
from distill.types import ConfigError, Target


@torch.no_grad()
def stored_rows(target: Target, where: Places, num_classes: int, keep: CachedTeacher, device: torch.device) -> Iterator[StoredRow]:
    """Give the rows of a batch as they are stored.

    The draws of a row depend on its content and the seed, not on the batch that it is in.

    Args:
        target: the teacher's, of all classes.
        where: of the batch.
        num_classes: V.
        keep: says what is kept.
        device: where the target is.

    Raises:
        ConfigError: the teacher does not know all classes.
    """
    valid = torch.from_numpy(where.valid).to(device)
    chunk, start, size = chunked(target, valid, num_classes), 0, chunk_size(num_classes, device)
    for i, key in enumerate(where.keys):
        end = start + int(where.valid[i].sum())
        generator = torch.Generator(device).manual_seed(_seed(key, keep.seed))
        slices = [slice(start + part.start, start + part.stop) for part in chunks(end - start, size)]
        parts = [sparse_target(_logp(chunk, rows, keep.T), keep.k, keep.draws, 1.0, generator) for rows in slices]
        ids, probs, tail = _joined(parts, device)
        real = torch.from_numpy(where.real[i]).to(device)
        hidden = {name: _array(tap[i, real].float()) for name, tap in target.taps.items()}
        yield StoredRow(_array(ids.int()), _array(probs.float()), _array(tail.float()), hidden)
        start = end


def _logp(chunk: Chunk, rows: slice, temperature: float) -> Tensor:
    side = chunk(rows)(slice(None))
    if not isinstance(side, Distribution):
        raise ConfigError("model.teacher.source: a store is written of a teacher that knows all classes at once, e.g. OnlineTeacher")
    return side.logp(temperature)


def _joined(parts: list[Sparse], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks of a row, as wide as the widest."""
    if not parts:
        return (
            torch.full((0, 1), -1, device=device),
            torch.zeros(0, 1, device=device),
            torch.zeros(0, device=device),
        )
    width = max(part.ids.shape[1] for part in parts)
    wide = lambda x, fill: F.pad(x, (0, width - x.shape[1]), value=fill)  # noqa: E731
    return (
        torch.cat([wide(part.ids, -1) for part in parts]),
        torch.cat([wide(part.probs, 0.0) for part in parts]),
        torch.cat([part.tail for part in parts]),
    )


def _seed(key: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(key + repr(seed).encode(), digest_size=7).digest(), "little")


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy(force=True)
