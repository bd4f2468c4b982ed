"""Sets of classes as bytes: each position's classes by falling frequency, and how far it is from one to the next.

A set of K classes of V needs `log2 (V over K)` bits, less than K of them in an order need, by `log2 K!`: 27 bytes at K = 50. Counted in the
data's order of frequency the distances are small.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.teachers.store.planes import Packer, Unpacker

FAR = 255  # steps of so much or more have the rest of them in a plane of their own


class Classes:
    """Codes sets of classes.

    Args:
        order: `[V]`, the classes by falling frequency.
    """

    def __init__(self, order: NDArray[np.int32]) -> None:
        self.order = order
        self.rank = np.empty(len(order) + 1, np.int32)  # the last is that of −1, which fills up: behind all others
        self.rank[order], self.rank[-1] = np.arange(len(order)), len(order)
        self.width = 2 if len(order) < 2**16 else 3  # bytes of a rank, and of a number of classes

    def put(self, packer: Packer, ids: NDArray[np.int32]) -> NDArray[np.intp]:
        """Add the sets.

        Args:
            packer: takes them.
            ids: `[P, K]`, different classes of each position; −1 fills up.

        Returns:
            Where in `ids.ravel()` the classes lie that are not −1, in the order in which they will be read.
        """
        ranks = self.rank[ids]
        by_rank = ranks.argsort(1)
        ranks = np.take_along_axis(ranks, by_rank, 1)
        known = ranks < len(self.order)
        steps = np.diff(ranks, axis=1, prepend=-1)[known] - 1
        assert not len(steps) or steps.min() >= 0, "the classes of a position are different"
        packer.put(known.sum(1), self.width)
        packer.put(np.minimum(steps, FAR))
        packer.put(steps[steps >= FAR] - FAR, self.width)
        return (by_rank + np.arange(len(ids))[:, None] * ids.shape[1])[known]

    def take(self, unpacker: Unpacker, positions: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read the sets.

        Returns:
            ids: `[P, K]`, −1 at the end of those that have fewer than the largest.
            known: `[P, K]`, where they are not −1.
        """
        counts = unpacker.take(positions, self.width).astype(np.int32)
        known = np.arange(counts.max(initial=0)) < counts[:, None]
        steps = unpacker.take(int(counts.sum())).astype(np.intp)
        far = np.flatnonzero(steps == FAR)
        steps[far] += unpacker.take(len(far), self.width)
        steps += 1
        ids = self.order[spread(steps, known).cumsum(1) - 1]
        if len(steps) < known.size:
            ids[~known] = -1
        return ids, known


def spread(values: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[Any]:
    """Put values where `known` is True, `[P, K]`, and 0 elsewhere."""
    if len(values) == known.size:
        return values.reshape(known.shape)
    out = np.zeros(known.shape, values.dtype)
    out[known] = values
    return out
