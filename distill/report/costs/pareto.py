"""Which models nothing else beats: the Pareto front of quality against what it costs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def front(costs: Sequence[float], qualities: Sequence[float]) -> NDArray[np.bool_]:
    """Say of each model whether no other has at most its cost and at least its quality, and one of the two better.

    Of several with the same cost and quality all are on the front, or none.

    Args:
        costs: `[n]`, less is better.
        qualities: `[n]`, more is better.

    Raises:
        ValueError: a value is NaN, which is neither better nor worse.
    """
    cost, quality = np.asarray(costs, float), np.asarray(qualities, float)
    if np.isnan(cost).any() or np.isnan(quality).any():
        raise ValueError("a cost or quality is NaN; leave that model out")
    order = np.lexsort((-quality, cost))  # the cheapest first, of them the best
    on = np.zeros(len(cost), bool)
    best, its_cost = -np.inf, np.nan
    for i in order:
        if quality[i] > best or (quality[i] == best and cost[i] == its_cost):
            on[i], best, its_cost = True, quality[i], cost[i]
    return on
