"""How many bits each layer gets: what quantising it alone costs, and the cheapest choice under a size budget."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from distill.types import ConfigError

UNITS = 100_000  # finest division of the budget; the greatest common divisor of a model's layers mostly needs far fewer


def increases_alone(names: Iterable[str], choices: Sequence[int], loss: Callable[[str | None, int], float]) -> dict[str, dict[int, float]]:
    """Measure `Δ_l(b) = L(only layer l at b bits) − L(no layer quantised)`.

    Args:
        names: of the layers.
        choices: numbers of bits.
        loss: evaluates the model on the calibration batch with this layer alone at so many bits, or with none; must be deterministic.

    Returns:
        Δ by layer and bits, in the unit of the loss.
    """
    before = loss(None, 0)
    return {name: {bits: loss(name, bits) - before for bits in choices} for name in names}


def monotone(increases: Mapping[int, float]) -> dict[int, float]:
    """Let more bits never cost more: `f(b) = min_{b' ≤ b} Δ(b')`, what a layer measured worse at more bits is noise.

    Args:
        increases: Δ by bits.
    """
    running, found = math.inf, {}
    for bits in sorted(increases):
        running = found[bits] = min(running, increases[bits])
    return found


def assign(increases: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Choose the bits `b_l` that minimise `Σ_l f_l(b_l)` under `Σ_l n_l b_l ≤ budget · Σ_l n_l`.

    The multiple-choice knapsack, solved by dynamic programming over the weights' greatest common divisor, so exactly (a size that would
    make more than 100,000 steps is rounded up, which keeps the budget). That losses add up over layers is an assumption: it is good
    while each is small.

    Args:
        increases: Δ_l by layer and bits, as of `increases_alone`; made monotone first.
        sizes: n_l, weights of each layer.
        budget: bits a weight on average; scales are not counted.

    Returns:
        Bits by layer.

    Raises:
        ConfigError: not even the fewest bits fit.
    """
    names = list(increases)
    fewest = sum(sizes[name] * min(increases[name]) for name in names) / sum(sizes[name] for name in names)
    if budget < fewest:
        raise ConfigError(
            f"budget is {budget:g} bits a weight, but the fewest that can be chosen are {fewest:g}; raise it to that at least"
        )
    unit = math.gcd(*(sizes[name] for name in names))
    unit *= math.ceil(sum(sizes.values()) * budget / unit / UNITS)
    room = math.floor(sum(sizes[name] for name in names) * budget / unit + 1e-9)
    best = np.zeros(room + 1)  # [room + 1], the least loss of the layers so far within that many units
    taken: list[np.ndarray] = []
    for name in names:
        options = monotone(increases[name])
        table = np.full((len(options), room + 1), np.inf)
        for row, (bits, cost) in zip(table, options.items(), strict=True):
            used = math.ceil(sizes[name] / unit) * bits
            row[used:] = best[: max(0, room + 1 - used)] + cost
        taken.append(table.argmin(0).astype(np.int8))  # the fewest bits among equals
        best = table.min(0)
    if math.isinf(best[room]):  # only the fewest bits fit, and not when rounded up
        return {name: min(increases[name]) for name in names}
    return _walk_back(names, increases, sizes, taken, unit, room)


def _walk_back(
    names: list[str],
    increases: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    taken: list[np.ndarray],
    unit: int,
    room: int,
) -> dict[str, int]:
    chosen = {}
    for name, rows in zip(reversed(names), reversed(taken), strict=True):
        bits = chosen[name] = sorted(increases[name])[int(rows[room])]
        room -= math.ceil(sizes[name] / unit) * bits
    return {name: chosen[name] for name in names}


def average(bits: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Bits a weight: `Σ_l n_l b_l / Σ_l n_l`."""
    return sum(sizes[name] * bits[name] for name in bits) / sum(sizes[name] for name in bits)
