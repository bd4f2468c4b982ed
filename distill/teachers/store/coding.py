"""A row as bytes and back. How a probability is rounded is said in `scale`, how classes are coded in `classes`."""

import struct

import numpy as np
from numpy.typing import NDArray

from distill.teachers.store import hidden
from distill.teachers.store.classes import Classes, spread
from distill.teachers.store.header import Header
from distill.teachers.store.planes import Packer, Unpacker
from distill.teachers.store.row import StoredRow
from distill.teachers.store.scale import Scale
from distill.types import DataError

_HEAD = struct.Struct("<II")  # positions with a label, real positions
Floats = NDArray[np.float32]


class Coder:
    """Makes bytes of the rows of one store, and rows of bytes. May be used by several threads.

    Classes and counts come back as they were, probabilities with `bits=32` too. With 8 or 16 bits they are rounded, then divided by their
    sum.

    Args:
        header: of the store.
        order: `[V]`, the classes by falling frequency.
    """

    def __init__(self, header: Header, order: NDArray[np.int32]) -> None:
        self.header, self.classes = header, Classes(order)
        self.scale = None if header.bits == 32 else Scale(header.bits)
        self.counts = header.draws > 0 and not (header.k and self.scale is None)  # else the drawn ones' probabilities, as they are
        self.count_width = 1 if header.draws < 2**8 else 2 if header.draws < 2**16 else 4

    def encode(self, row: StoredRow) -> bytes:
        """Give the bytes of a row.

        Raises:
            DataError: the teacher's probabilities are none, or its hidden states are not finite.
        """
        ids, probs, tail = row.ids.astype(np.int32), row.probs.astype(np.float32), row.tail.astype(np.float32)
        self._check(probs, tail)
        length = next((len(states) for states in row.hidden.values()), 0)
        packer, k = Packer(), self.header.k
        if k:
            rest = probs[:, k:].sum(1) if self.header.draws else tail
            self._put_probs(packer, ids[:, :k], probs[:, :k], rest)
        if self.header.draws:
            self._put_draws(packer, ids[:, k:], probs[:, k:])
        for name in sorted(self.header.hidden):
            hidden.put(packer, name, row.hidden[name])
        return _HEAD.pack(len(ids), length) + packer.bytes()

    def decode(self, data: bytes) -> StoredRow:
        """Give the row of bytes that `encode` gave."""
        positions, length = _HEAD.unpack_from(data)
        unpacker = Unpacker(data[_HEAD.size :])
        parts: list[tuple[NDArray[np.int32], Floats]] = []
        rest = np.ones(positions, np.float32)
        if self.header.k:
            ids, probs, rest = self._take_probs(unpacker, positions)
            parts.append((ids, probs))
        if self.header.draws:
            parts.append(self._take_draws(unpacker, positions, rest))
            rest = np.zeros(positions, np.float32)
        ids, probs = (np.concatenate(each, 1) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))
        if self.scale is not None:
            total = probs.sum(1) + rest
            probs, rest = probs / total[:, None], rest / total
        states = {name: hidden.take(unpacker, length, width) for name, width in sorted(self.header.hidden.items())}
        return StoredRow(ids, probs, rest, states)

    def _check(self, probs: Floats, tail: Floats) -> None:
        total = probs.sum(1, dtype=np.float64) + tail
        if wrong := np.flatnonzero(~(np.abs(total - 1) < 1e-3)).tolist():  # NaN too
            raise DataError(
                f"the teacher's probabilities sum up to {total[wrong[0]]:g} at {len(wrong)} of {len(total)} positions of a row, "
                "they should to 1; run it in another dtype, e.g. model.teacher.dtype=float32"
            )

    def _put_probs(self, packer: Packer, ids: NDArray[np.int32], probs: Floats, rest: Floats) -> None:
        where = self.classes.put(packer, ids)
        if self.scale is None:
            _put_floats(packer, probs.ravel()[where])
            _put_floats(packer, rest)
            return
        levels = self.scale.levels(probs)
        least = np.where(ids < 0, self.scale.top, levels).min(1, initial=self.scale.top)
        packer.put(least, self.scale.width)
        packer.put((levels - least[:, None]).ravel()[where], self.scale.width)
        packer.put(self.scale.levels(rest), self.scale.width)

    def _take_probs(self, unpacker: Unpacker, positions: int) -> tuple[NDArray[np.int32], Floats, Floats]:
        ids, known = self.classes.take(unpacker, positions)
        if self.scale is None:
            return ids, spread(_take_floats(unpacker, int(known.sum())), known), _take_floats(unpacker, positions)
        least = unpacker.take(positions, self.scale.width)
        levels = spread(unpacker.take(int(known.sum()), self.scale.width), known)
        probs = self.scale.probs(levels + least[:, None])
        rest = self.scale.probs(unpacker.take(positions, self.scale.width))
        return ids, probs * known, rest

    def _put_draws(self, packer: Packer, ids: NDArray[np.int32], probs: Floats) -> None:
        where = self.classes.put(packer, ids)
        if not self.counts:
            _put_floats(packer, probs.ravel()[where])
            return
        mass = probs.sum(1, dtype=np.float64, keepdims=True)
        counts = np.rint(probs * (self.header.draws / np.where(mass > 0, mass, 1))).astype(np.int64)
        assert np.isin(counts.sum(1), (0, self.header.draws)).all(), "the probabilities are those of so many draws"
        packer.put(counts.ravel()[where], self.count_width)

    def _take_draws(self, unpacker: Unpacker, positions: int, mass: Floats) -> tuple[NDArray[np.int32], Floats]:
        ids, known = self.classes.take(unpacker, positions)
        if not self.counts:
            return ids, spread(_take_floats(unpacker, int(known.sum())), known)
        counts = spread(unpacker.take(int(known.sum()), self.count_width), known)
        return ids, mass[:, None] * (counts.astype(np.float32) / np.float32(self.header.draws))


def _put_floats(packer: Packer, values: Floats) -> None:
    packer.put(np.ascontiguousarray(values).view(np.int32), 4)


def _take_floats(unpacker: Unpacker, count: int) -> Floats:
    return unpacker.take(count, 4).view(np.float32)
