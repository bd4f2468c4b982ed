from typing import Any

import numpy as np
import pytest
from scipy import stats

from distill.metrics import bootstrap
from distill.metrics.bootstrap import Resampler
from distill.types import DataError

ROWS = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5])


def values(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).exponential(size=n)


def level(rows: int) -> float:
    """The level at which a percentile interval is the expanded one."""
    return float(1 - 2 * stats.norm.cdf(-np.sqrt(rows / (rows - 1)) * stats.t.ppf(0.975, rows - 1)))


def by_scipy(x: Any, statistic: Any, seed: int, resamples: int = 2000) -> Any:
    """scipy's percentile interval of one sample, or of several that are resampled together."""
    sample = x if isinstance(x, tuple) else (x,)
    kwargs: Any = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": resamples}
    return stats.bootstrap(
        sample, statistic, confidence_level=level(len(sample[0])), rng=np.random.default_rng(seed), **kwargs
    ).confidence_interval


def by_hand(resampler: Resampler, column: Any) -> Any:
    """Mean over all positions of the rows that a resample holds, written row by row."""
    rows, generator, found = resampler.rows, np.random.default_rng(resampler.seed), []
    for _ in range(resampler.resamples):
        drawn = generator.integers(0, rows.max() + 1, rows.max() + 1)
        found.append(np.nanmean(np.concatenate([column[rows == row] for row in drawn])))
    return np.array(found)


def test_with_one_position_a_row_the_interval_is_scipys() -> None:
    x = values(97)
    found = Resampler(np.arange(97), seed=5).mean(x)
    assert found.value == pytest.approx(x.mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(by_scipy(x, np.mean, 5)), rel=1e-12)


def test_the_level_is_that_of_hesterberg() -> None:
    assert level(10) == pytest.approx(1 - 2 * 0.0085, abs=2e-4)  # his table for n = 10 with t: 0.0085 in place of 0.025
    assert level(10**7) == pytest.approx(0.95, abs=1e-5)


def test_a_paired_difference_and_a_ratio_are_scipys() -> None:
    a, b = values(80, 1), values(80, 2) + 0.1
    resampler = Resampler(np.arange(80), seed=3)
    expected = by_scipy((a, b), lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis), 3)
    assert (found := resampler.difference(a, b)).value == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)
    expected = by_scipy((a, b), lambda x, y, axis: np.mean(x, axis) / np.mean(y, axis), 3)
    assert (found := resampler.ratio(a, b)).value == pytest.approx(a.mean() / b.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


def test_rows_are_drawn_whole_and_weigh_as_their_positions() -> None:
    x, resampler = values(len(ROWS)), Resampler(ROWS, seed=2, resamples=200)
    value, draws = resampler.means(x)
    assert value == pytest.approx(x.mean())
    np.testing.assert_allclose(draws, by_hand(resampler, x), rtol=1e-12)


def test_positions_that_are_nan_are_left_out() -> None:
    x, resampler = values(len(ROWS)), Resampler(ROWS, seed=2, resamples=200)
    x[[0, 5, 9]] = np.nan
    value, draws = resampler.means(x)
    assert value == pytest.approx(np.nanmean(x))
    np.testing.assert_allclose(draws, by_hand(resampler, x), rtol=1e-12)
    np.testing.assert_allclose(resampler.sums(x[:, None]), resampler.sums(np.nan_to_num(x)[:, None]), rtol=1e-12)


def test_a_ratio_leaves_out_positions_at_which_either_is_nan() -> None:
    a, b, resampler = values(len(ROWS), 1), values(len(ROWS), 2), Resampler(ROWS)
    a[4], b[7] = np.nan, np.nan
    both = np.delete(np.arange(len(ROWS)), [4, 7])
    found, expected = resampler.ratio(a, b), resampler.at(both).ratio(a[both], b[both])
    assert found.value == pytest.approx(a[both].sum() / b[both].sum())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_sums_are_of_each_column() -> None:
    columns, resampler = np.stack([values(12, 1), values(12, 2)], axis=1), Resampler(ROWS, resamples=50)
    ones = resampler.sums(np.ones((12, 1)))
    for c in range(2):
        np.testing.assert_allclose(resampler.sums(columns)[:, c], resampler.means(columns[:, c])[1] * ones[:, 0], rtol=1e-12)


def test_groups_are_summed_apart() -> None:
    x, groups, resampler = values(12), np.arange(12) % 3, Resampler(ROWS, resamples=50)
    found = resampler.grouped(x, groups, 4)
    expected = resampler.sums(np.stack([x * (groups == group) for group in range(4)], axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    two = resampler.grouped(np.stack([x, 2 * x], 1), np.stack([groups, groups], 1), 4)
    np.testing.assert_allclose(two, 3 * expected, rtol=1e-12)


def test_some_positions_have_the_same_resamples() -> None:
    x, some, resampler = values(12), np.array([1, 4, 7, 8, 11]), Resampler(ROWS, resamples=100)  # no position of rows 1 and 4
    masked = np.full(12, np.nan)
    masked[some] = x[some]
    np.testing.assert_array_equal(resampler.at(some).means(x[some])[1], resampler.means(masked)[1])
    expected = by_hand(resampler, np.where(np.isnan(masked), 0.0, masked)) / by_hand(resampler, ~np.isnan(masked) * 1.0)
    np.testing.assert_allclose(resampler.at(some).means(x[some])[1], expected, rtol=1e-12)
    np.testing.assert_array_equal(resampler.rows, ROWS)


def test_a_seed_gives_the_same_draws_every_time_and_another_gives_others() -> None:
    x, resampler = values(12), Resampler(ROWS, seed=1)
    assert resampler.mean(x) == resampler.mean(x) == Resampler(ROWS, seed=1).mean(x)
    assert resampler.mean(x) != Resampler(ROWS, seed=2).mean(x)


def test_blocks_change_nothing_nor_does_drawing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.stack([values(97), values(97, 1)], axis=1)
    whole = Resampler(np.arange(97), resamples=101).sums(x)
    monkeypatch.setattr(bootstrap, "BLOCK", 97 * 7)
    for kept in (2**20, 0):
        monkeypatch.setattr(bootstrap, "KEPT_BYTES", kept)
        resampler = Resampler(np.arange(97), resamples=101)
        for _ in range(2):
            np.testing.assert_allclose(resampler.sums(x), whole, rtol=1e-12)
        assert bool(resampler._kept) == bool(kept)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Resampler(np.array([], np.int64)), "no held-out position"),
        (lambda: Resampler(np.zeros(5, np.int64)).mean(np.ones(5)), "only one held-out row"),
        (lambda: Resampler(ROWS).at(np.array([0, 1])).mean(np.ones(2)), "only one held-out row"),
        (lambda: Resampler(np.zeros(5, np.int64)).difference(np.arange(5.0), np.zeros(5)), "only one held-out row"),
        (lambda: Resampler(ROWS).mean(np.full(12, np.nan)), "no position has a value"),
        (lambda: Resampler(ROWS).mean(np.where(ROWS == 5, np.inf, 1.0)), "1 of 12 positions have an infinite"),
        (lambda: Resampler(ROWS).ratio(np.ones(12), np.zeros(12)), "divided by is 0"),
        (lambda: Resampler(ROWS).interval(float("nan"), np.ones(2000)), "not a finite number"),
        (lambda: Resampler(ROWS).interval(1.0, np.full(2000, np.nan)), "not a finite number"),
    ],
)
def test_what_cannot_be_measured_says_why(ask: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ask()


def test_resamples_without_a_value_are_left_out_and_rows_without_one_do_not_count() -> None:
    column = np.where(ROWS == 0, 2.0, np.where(ROWS == 1, 1.0, np.nan))  # some resamples hold neither row
    resampler = Resampler(ROWS)
    assert np.isnan(resampler.means(column)[1]).any()
    found = resampler.mean(column)
    assert (found.value, found.low, found.high) == (1.75, 1.0, 2.0)  # of two rows nothing narrower is known
    with pytest.raises(DataError, match="only one held-out row"):
        resampler.mean(np.where(ROWS == 0, 2.0, np.nan))


# Coverage: columns are 1,000 independent samples that share the resamples; the truth is known from the distribution.
SAMPLES = 1000


def covered(resampler: Resampler, value: Any, draws: Any, truth: float) -> float:
    intervals = [resampler.interval(float(value[i]), draws[:, i]) for i in range(len(value))]
    return float(np.mean([each.low <= truth <= each.high for each in intervals]))


def rights(rows: int, generator: np.random.Generator) -> tuple[Any, Any, float, float]:
    """Teacher right in 80 %; the student answers as it does but in 25 % of cases, where it is right in 60 %."""
    teacher = generator.random((rows, SAMPLES)) < 0.8
    other = generator.random((rows, SAMPLES)) < 0.25
    student = np.where(other, generator.random((rows, SAMPLES)) < 0.6, teacher)
    return student.astype(float), teacher.astype(float), 0.75 * 0.8 + 0.25 * 0.6, 0.8


@pytest.mark.parametrize(
    ("what", "rows"), [("accuracy", 270), ("nll", 270), ("difference", 270), ("ratio", 270), ("clusters", 270), ("nll", 1000)]
)
def test_intervals_cover_the_truth_in_93_to_97_percent_of_cases(what: str, rows: int) -> None:
    generator, resampler = np.random.default_rng(rows), Resampler(np.arange(rows), seed=9)
    student, teacher, mine, theirs = rights(rows, generator)
    ones = np.ones((rows, SAMPLES))
    above, below, truth = {
        "accuracy": lambda: (student, ones, mine),
        "nll": lambda: (generator.exponential(size=(rows, SAMPLES)), ones, 1.0),
        "difference": lambda: (student - teacher, ones, mine - theirs),
        "ratio": lambda: (student, teacher, mine / theirs),
        "clusters": lambda: clusters(rows, generator),
    }[what]()
    draws = resampler.sums(above) / resampler.sums(below)
    assert 0.93 <= covered(resampler, above.sum(0) / below.sum(0), draws, truth) <= 0.97


def clusters(rows: int, generator: np.random.Generator) -> tuple[Any, Any, float]:
    """Rows of 5 to 199 positions, each with an accuracy of its own that is higher in long rows."""
    sizes = generator.integers(5, 200, (rows, SAMPLES))
    share = np.clip(0.6 + sizes / 1000 + generator.uniform(-0.15, 0.15, sizes.shape), 0, 1)
    every = np.arange(5, 200)
    return generator.binomial(sizes, share).astype(float), sizes.astype(float), float((every * (0.6 + every / 1000)).sum() / every.sum())


def test_positions_taken_as_independent_would_cover_far_too_little() -> None:
    generator = np.random.default_rng(1)
    rows = np.repeat(np.arange(60), 20)
    hits = {"rows": 0, "positions": 0}
    for seed in range(100):
        right = (generator.random(1200) < generator.beta(2, 2, 60)[rows]).astype(float)
        for name, clusters_of in (("rows", rows), ("positions", np.arange(1200))):
            found = Resampler(clusters_of, seed=seed, resamples=200).mean(right)
            hits[name] += found.low <= 0.5 <= found.high
    assert hits["rows"] >= 0.9 * 100
    assert hits["positions"] <= 0.8 * 100


@pytest.mark.parametrize("rows", [2, 6, 40])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_share_on_which_all_rows_agree_has_clopper_and_pearsons_interval(rows: int, right: float) -> None:
    """Resamples of rows that agree all agree, and would say that it is certain."""
    found = Resampler(np.arange(rows)).share(np.full(rows, right))
    exact = stats.binomtest(int(right * rows), rows).proportion_ci(0.95)
    assert found.as_dict() == pytest.approx({"value": right, "low": exact.low, "high": exact.high})


def test_a_share_counts_rows_not_positions_and_is_else_the_mean() -> None:
    many = Resampler(np.repeat(np.arange(6), 50))
    assert many.share(np.ones(300)).low == pytest.approx(0.025 ** (1 / 6))
    some = np.where(np.arange(300) < 100, np.nan, 1.0)  # two rows without a value
    assert many.share(some).low == pytest.approx(0.025 ** (1 / 4))
    mixed = (np.arange(300) % 7 < 5).astype(float)
    assert many.share(mixed) == many.mean(mixed)


def test_two_models_that_are_right_alike_on_few_rows_may_differ_on_others() -> None:
    right = np.array([1.0, 1, 1, 0])
    reach = 1 - 0.025 ** (1 / 4)
    assert Resampler(np.arange(4)).difference(right, right).as_dict() == pytest.approx({"value": 0, "low": -reach, "high": reach})
    ratio = Resampler(np.arange(4)).ratio(right, right)
    assert ratio.as_dict() == pytest.approx({"value": 1, "low": max(0, 1 - reach / 0.75), "high": 1 + reach / 0.75})
    always, never = np.ones(4), np.zeros(4)
    assert Resampler(np.arange(4)).difference(never, always).as_dict() == pytest.approx({"value": -1, "low": -1, "high": -1 + 2 * reach})
    assert Resampler(np.arange(4)).ratio(never, always).as_dict() == pytest.approx({"value": 0, "low": 0, "high": reach})
    losses = 1 + np.arange(4.0)  # no shares
    assert Resampler(np.arange(4)).difference(losses, losses).as_dict() == {"value": 0, "low": 0, "high": 0}
