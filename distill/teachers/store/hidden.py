"""Hidden states in 8 bits."""

import numpy as np
from numpy.typing import NDArray

from distill.teachers.store.planes import Packer, Unpacker
from distill.types import DataError


def put(packer: Packer, name: str, states: NDArray[np.floating]) -> None:
    """Add `[S, D]` as integers of 8 bits with one scale a position: `q = round(h / s)`, `s = max |h| / 127`; the error is at most `s / 2`.

    Raises:
        DataError: the states are not finite.
    """
    values = states.astype(np.float32)
    scale = np.abs(values).max(1, keepdims=True, initial=0) / np.float32(127)
    if not np.isfinite(scale).all():
        raise DataError(f"the teacher's hidden states '{name}' are not finite; run it in another dtype, e.g. model.teacher.dtype=float32")
    levels = np.rint(values / np.where(scale > 0, scale, 1)).astype(np.int8)
    packer.put(scale.view(np.uint8).reshape(-1, 4).T.copy())
    packer.put(levels.view(np.uint8))


def take(unpacker: Unpacker, positions: int, width: int) -> NDArray[np.float32]:
    """Read `[S, D]`, float32."""
    scale = unpacker.take(4 * positions).reshape(4, -1).T.copy().view(np.float32)
    levels = unpacker.take(positions * width).view(np.int8)
    return levels.reshape(positions, width) * scale
