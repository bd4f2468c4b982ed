import numpy as np
import pytest

from distill.report.costs.pareto import front


def test_it_is_what_comparing_every_pair_finds() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 40):
        for _ in range(30):
            cost, quality = rng.integers(0, 8, (2, size)).astype(float)  # few values, so that there are ties
            beaten = [
                any(c <= cost[i] and q >= quality[i] and (c < cost[i] or q > quality[i]) for c, q in zip(cost, quality, strict=True))
                for i in range(size)
            ]
            assert front(cost, quality).tolist() == [not each for each in beaten]


def test_none_and_nan() -> None:
    assert front([], []).tolist() == []
    with pytest.raises(ValueError, match="NaN"):
        front([1.0, float("nan")], [1.0, 1.0])
