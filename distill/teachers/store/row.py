"""A row of the store in memory, and the key it is found by."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What a teacher says of one row of tokens: P positions with a label, S real positions (not padding).

    Attributes:
        ids: `[P, K]`, int32, different classes; −1 fills up, never the first. When written: the k likeliest first, then drawn ones, as
            `sparse_target` gives them. When read: the same classes of each kind in another order.
        probs: `[P, K]`, float32; 0 where `ids` is −1.
        tail: `[P]`, float32, the probability of all other classes; `Σ_k probs + tail = 1`.
        hidden: by the name of the tap, `[S, D]`, float16 or float32; float32 when read.
    """

    ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    tail: NDArray[np.float32]
    hidden: dict[str, NDArray[Any]] = field(default_factory=dict)


def row_key(input_ids: ArrayLike, position_ids: ArrayLike | None, valid: ArrayLike, route: ArrayLike | None = None) -> bytes:
    """Name a row by its content: the same however it is batched, padded, shuffled or packed with the same neighbours.

    Args:
        input_ids: `[S]`, the tokens of the real positions: padding is cut off by the caller.
        position_ids: `[S]`, where rows are packed: they say where each document starts. None is `0 … S − 1`, one document.
        valid: `[S]`, boolean, which positions have a label; `[1]` for one label per row.
        route: of the same shape, the number of each position's teacher, where rows name theirs.

    Returns:
        16 bytes, blake2b.
    """
    ids = np.ascontiguousarray(input_ids, "<i8")
    positions = np.arange(len(ids), dtype="<i8") if position_ids is None else np.ascontiguousarray(position_ids, "<i8")
    labelled = np.ascontiguousarray(valid, np.bool_)
    digest = hashlib.blake2b(np.array([len(ids), len(labelled)], "<i8").tobytes(), digest_size=16)
    named = [] if route is None else [np.ascontiguousarray(route, "<i8")]
    for part in (ids, positions, np.packbits(labelled), *named):
        digest.update(part.tobytes())
    return digest.digest()
