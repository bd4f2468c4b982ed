from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from distill.metrics.bootstrap import Resampler
from distill.metrics.calibration import classwise_ece, ece, equal_mass, equal_width, reliability
from distill.types import DataError

# Four bins of a quarter: two positions in (0.25, 0.5], one in (0.5, 0.75], three in (0.75, 1].
CONFIDENCE = np.array([0.5, 0.3, 0.6, 0.8, 0.9, 1.0])
CORRECT = np.array([True, False, False, True, True, False])
ROWS = np.array([0, 0, 1, 1, 2, 2])


def drawn(n: int, classes: int, seed: int = 0) -> tuple[Any, Any]:
    """Probabilities and labels: the model is too certain."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(n, classes))
    true = np.exp(0.5 * logits)
    labels = (generator.random((n, 1)) > np.cumsum(true / true.sum(1, keepdims=True), 1)).sum(1).clip(max=classes - 1)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


def top(probs: Any, labels: Any) -> tuple[Any, Any]:
    return probs.max(1), probs.argmax(1) == labels


def test_a_case_by_hand() -> None:
    found = ece(Resampler(ROWS), CONFIDENCE, CORRECT, equal_width(CONFIDENCE, 4))
    assert found.value == pytest.approx((2 * abs(0.4 - 0.5) + 1 * abs(0.6 - 0.0) + 3 * abs(0.9 - 2 / 3)) / 6)
    found = ece(Resampler(ROWS), CONFIDENCE, CORRECT, equal_mass(CONFIDENCE, 3))  # pairs: 0.3 and 0.5, 0.6 and 0.8, 0.9 and 1
    assert found.value == pytest.approx((2 * abs(0.4 - 0.5) + 2 * abs(0.7 - 0.5) + 2 * abs(0.95 - 0.5)) / 6)


def test_edges_belong_to_the_bin_below_as_in_guo() -> None:
    probs = np.array([0.0, 0.1, 0.25, 0.26, 0.5, 0.75, 1.0, 1 + 1e-9])
    assert equal_width(probs, 4).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]


def test_bins_of_equal_mass_hold_as_many_and_keep_equal_ones_together() -> None:
    assert np.bincount(equal_mass(np.random.default_rng(0).random(1500))).tolist() == [100] * 15
    tied = np.repeat([0.2, 0.7, 0.9], [50, 30, 20])
    assert len({(p, b) for p, b in zip(tied, equal_mass(tied, 5), strict=True)}) == 3


@pytest.mark.parametrize(("n", "classes"), [(500, 2), (3000, 7)])
def test_ece_is_torchmetrics(n: int, classes: int) -> None:
    probs, labels = drawn(n, classes)
    found = ece(Resampler(np.arange(n)), *top(probs, labels), equal_width(probs.max(1)))
    expected = multiclass_calibration_error(torch.tensor(probs), torch.tensor(labels), num_classes=classes, n_bins=15, norm="l1")
    assert found.value == pytest.approx(expected.item(), rel=1e-5)


def test_classwise_ece_is_the_mean_of_torchmetrics_of_each_class() -> None:
    for classes in (2, 5, 40):  # 40 classes of 15 bins are more cells than are drawn at a time
        probs, labels = drawn(1000, classes)
        each = [binary_calibration_error(torch.tensor(probs[:, v]), torch.tensor(labels == v).long(), n_bins=15) for v in range(classes)]
        found = classwise_ece(Resampler(np.arange(1000), resamples=50), probs, labels)
        assert found.value == pytest.approx(float(np.mean(each)), rel=1e-5)


def test_classwise_ece_of_two_classes_by_hand() -> None:
    first = np.repeat([0.2, 0.9], 10)
    labels = np.repeat([0, 1, 0, 1], [4, 6, 5, 5])  # class 0 is said in 20 % and 90 % of cases, and is the label in 40 % and 50 %
    found = classwise_ece(Resampler(np.arange(20)), np.stack([first, 1 - first], 1), labels)
    assert found.value == pytest.approx((0.5 * 0.2 + 0.5 * 0.4 + 0.5 * 0.2 + 0.5 * 0.4) / 2)


def test_too_few_positions_for_the_classes_are_refused() -> None:
    probs, labels = drawn(99, 10)
    with pytest.raises(DataError, match=r"99 positions are too few for 10 classes.* 100 are needed"):
        classwise_ece(Resampler(np.arange(99)), probs, labels)


def test_reliability_is_sklearns_curve() -> None:
    probs, labels = drawn(2000, 2)
    confidence, correct = top(probs, labels)
    bins = reliability(Resampler(np.arange(2000)), confidence, correct, equal_width(confidence))
    share, said = calibration_curve(correct, confidence, n_bins=15)
    np.testing.assert_allclose([each.accuracy for each in bins], share)
    np.testing.assert_allclose([each.confidence for each in bins], said)
    assert sum(each.count for each in bins) == 2000


def test_the_interval_of_a_bin_is_that_of_its_positions() -> None:
    probs, labels = drawn(600, 3)
    confidence, correct = top(probs, labels)
    resampler, where = Resampler(np.repeat(np.arange(200), 3)), equal_width(confidence)
    for b, each in zip(np.unique(where), reliability(resampler, confidence, correct, where), strict=True):
        here = where == b
        expected = resampler.mean(np.where(here, correct, np.nan))
        assert each.interval is not None
        assert (each.count, each.accuracy) == (here.sum(), pytest.approx(expected.value))
        assert (each.interval.low, each.interval.high) == pytest.approx((expected.low, expected.high))


def test_a_bin_of_one_row_has_no_interval() -> None:
    low, high = reliability(Resampler(ROWS[:4]), CONFIDENCE[:4], CORRECT[:4], np.array([0, 0, 1, 1]))
    assert (low.interval, high.interval) == (None, None)
    assert (low.count, low.confidence, low.accuracy) == (2, 0.4, 0.5)


def test_rows_of_different_length_weigh_as_their_positions() -> None:
    rows = np.repeat(np.arange(40), np.arange(1, 41))
    confidence, correct = np.full(len(rows), 0.95), rows < 20
    found = ece(Resampler(rows), confidence, correct, equal_width(confidence))
    plain = Resampler(rows).difference(confidence, correct)  # one bin: ECE is the gap itself, far from 0
    assert found.value == pytest.approx(plain.value)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), rel=0.02)


def simulated(rows: int, per: int, too_certain: float, generator: np.random.Generator) -> tuple[Any, Any]:
    confidence = generator.beta(5, 2, (rows, per)).clip(0.02, 0.999)
    luck = 0.5 * generator.normal(size=(rows, 1))  # of a row: its positions are right or wrong together
    level = torch.special.ndtri(torch.from_numpy(confidence * (1 - too_certain))).numpy() * np.sqrt(1.25)
    right = generator.random((rows, per)) < torch.special.ndtr(torch.from_numpy(level + luck)).numpy()
    return confidence.ravel(), right.ravel()


@pytest.mark.parametrize(("rows", "per"), [(270, 1), (270, 20)])
@pytest.mark.parametrize("too_certain", [0.0, 0.05, 0.15])
def test_the_interval_of_ece_covers_the_true_error(rows: int, per: int, too_certain: float) -> None:
    generator = np.random.default_rng(5)
    everything = generator.beta(5, 2, 200_000).clip(0.02, 0.999)
    truth = too_certain * everything.mean()  # the model is too certain in every bin
    resampler = Resampler(np.repeat(np.arange(rows), per), resamples=400)
    hits, plain = 0, 0
    for _ in range(120):
        confidence, correct = simulated(rows, per, too_certain, generator)
        bins = equal_width(confidence)
        found = ece(resampler, confidence, correct, bins)
        hits += found.low <= truth <= found.high
        gaps = resampler.grouped(confidence - correct, bins, 15) / len(bins)
        low, high = np.quantile(np.abs(gaps).sum(1), [0.025, 0.975])
        plain += low <= truth <= high
    assert hits >= 0.91 * 120
    assert too_certain or plain == 0  # percentiles never hold the 0 of a calibrated model


def test_the_interval_of_classwise_ece_holds_0_for_a_calibrated_model_and_not_for_another() -> None:
    generator, resampler = np.random.default_rng(0), Resampler(np.arange(1000), resamples=500)
    probs = generator.dirichlet(np.ones(4), 1000)
    labels = (generator.random((1000, 1)) > np.cumsum(probs, 1)).sum(1).clip(max=3)
    assert classwise_ece(resampler, probs, labels).low == 0
    sharp = probs**2 / (probs**2).sum(1, keepdims=True)
    found = classwise_ece(resampler, sharp, labels)
    assert 0.02 < found.low < found.value <= found.high
