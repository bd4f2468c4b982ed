"""Against scipy, statsmodels' published example, and differences that are known."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from distill.metrics.bootstrap import Interval
from distill.report import rows
from distill.report.runs.paired import Student, differences, mcnemar, mean, sentence
from distill.types import DataError
from tests.report.made import observed


def student(correct: np.ndarray, per_row: int = 1, **kwargs: object) -> Student:
    return Student(rows.of(observed(np.ones(len(correct)), correct, per_row, **kwargs)), "student distilled")


def test_a_paired_difference_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(900) < 0.6
    b = np.where(rng.random(900) < 0.2, rng.random(900) < 0.8, a)  # mostly right on the same rows
    found = differences(student(a), student(b))["correct"]
    theirs = bootstrap(
        (b.astype(float), a.astype(float)),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=1,
    )
    assert found.value == pytest.approx(b.mean() - a.mean())
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * width)


def test_rows_of_many_positions_are_drawn_whole() -> None:
    """All positions of a row are alike, so that there are as many independent values as rows."""
    rng = np.random.default_rng(0)
    nll = np.repeat(rng.normal(size=100), 9)
    one, other = student(np.ones(900), 9, nll=np.zeros(900)), student(np.ones(900), 9, nll=nll)
    found = differences(one, other)["nll"]
    assert found.value == pytest.approx(nll.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * nll[::9].std() / 10, rel=0.15)


def test_a_constant_difference_has_no_width_where_it_is_paired_and_much_where_not() -> None:
    nll = np.random.default_rng(0).normal(size=400)
    one, other = student(np.ones(400), nll=nll), student(np.ones(400), nll=nll + 0.5)
    assert differences(one, other)["nll"].as_dict() == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    elsewhere = Student(rows.Rows("other", other.rows.count, other.rows.sums), other.name)
    apart = differences(one, elsewhere)["nll"]
    assert apart.value == pytest.approx(0.5)
    assert (apart.high - apart.low) / 2 == pytest.approx(1.96 * np.sqrt(2) * nll.std() / 20, rel=0.15)
    assert set(differences(one, other)) == {"correct", "nll", "kl", "agreement"}


def test_an_interval_is_that_of_the_runs_own_report() -> None:
    rng = np.random.default_rng(0)
    correct, nll = rng.random(60) < 0.7, rng.normal(size=60)
    seen = observed(np.ones(60), correct, 3, nll=nll)
    of, columns = rows.of(seen), seen.models["student distilled"]
    theirs = seen.resampler.mean(columns.correct(seen.labels).astype(float))
    assert mean(of, of.sums["student distilled"]["correct"], share=True).as_dict() == pytest.approx(theirs.as_dict())
    assert mean(of, of.sums["student distilled"]["nll"]).as_dict() == pytest.approx(seen.resampler.mean(nll).as_dict())
    always = mean(of, of.sums["teacher"]["correct"], share=True)
    assert always.as_dict() == pytest.approx({"value": 1.0, "low": 0.025 ** (1 / 20), "high": 1.0})


def test_one_row_tells_no_difference() -> None:
    one, other = student(np.ones(5), 5), student(np.zeros(5), 5)
    with pytest.raises(DataError, match="only one held-out row"):
        differences(one, other)


def test_mcnemar_counts_and_is_a_binomial_tail() -> None:
    a, b = np.array([1] * 12 + [0] * 8 + [1] * 50 + [0] * 30), np.array([0] * 12 + [1] * 8 + [1] * 50 + [0] * 30)
    only_a, only_b, p = mcnemar(a, b)
    assert (only_a, only_b) == (12, 8)
    assert p == pytest.approx(2 * sum(_choose(20, k) for k in range(9)) / 2**20)
    assert mcnemar(b, a)[2] == pytest.approx(p)
    assert mcnemar(a, a) == (0, 0, 1.0)


def _choose(n: int, k: int) -> float:
    return float(np.prod([(n - i) / (i + 1) for i in range(k)]))


@pytest.mark.parametrize(
    ("figure", "interval", "said"),
    [
        ("correct", (0.012, 0.004, 0.020), "B is better by 1.2 points (0.4 – 2.0)"),
        ("correct", (-0.012, -0.020, -0.004), "A is better by 1.2 points (0.4 – 2.0)"),
        ("nll", (0.5, 0.25, 0.75), "A is better by 0.5000 nats (0.2500 – 0.7500)"),
        ("nll", (-0.5, -0.75, -0.25), "B is better by 0.5000 nats (0.2500 – 0.7500)"),
        ("kl", (-0.5, -0.75, 0.25), "no difference can be told: −0.5000 nats (−0.7500 – +0.2500)"),
        ("correct", (0.0, 0.0, 0.0), "no difference can be told: +0.0 points (+0.0 – +0.0)"),
    ],
)
def test_who_is_better(figure: str, interval: tuple[float, float, float], said: str) -> None:
    assert sentence(figure, Interval(*interval), "A", "B") == said
