import numpy as np
import pytest
from sklearn.metrics import (  # type: ignore[import-untyped]
    balanced_accuracy_score,
    f1_score,
    precision_recall_fscore_support,
)

from distill.data.profile import FEW, HEAD, profile
from distill.metrics.bootstrap import Resampler
from distill.metrics.classes import GROUPS, group_of, per_class, per_class_of_sums, resampled

LABELS, TOP = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 4, 4])


def random(n: int = 200, v: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.choice(v, n, p=[0.5, 0.3, 0.1, 0.06, 0.04, 0.0])
    return labels, np.where(rng.random(n) < 0.6, labels, rng.integers(0, v, n))


def test_by_hand() -> None:
    found = per_class(TOP, LABELS, 5)
    np.testing.assert_allclose(found.support, [3, 2, 0, 1, 0])
    np.testing.assert_allclose(found.precision, [1, 1 / 2, 0, 0, 0])
    np.testing.assert_allclose(found.recall, [2 / 3, 1 / 2, np.nan, 0, np.nan])
    np.testing.assert_allclose(found.f1, [4 / 5, 1 / 2, np.nan, 0, np.nan])
    assert found.macro_f1 == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_means_are_those_of_scikit_learn() -> None:
    labels, top = random()
    found = per_class(top, labels, 6)
    there = np.unique(labels)
    assert found.macro_f1 == pytest.approx(f1_score(labels, top, labels=there, average="macro"))
    keep = top != 5  # scikit-learn's has no way to leave a class without labels out
    assert per_class(top[keep], labels[keep], 6).balanced_accuracy == pytest.approx(balanced_accuracy_score(labels[keep], top[keep]))


def test_sums_give_the_same() -> None:
    labels, top = random()
    true_positives = np.bincount(labels[top == labels], minlength=6).astype(float)
    found = per_class_of_sums(true_positives, np.bincount(top, minlength=6).astype(float), np.bincount(labels, minlength=6).astype(float))
    for ours, theirs in zip(found, per_class(top, labels, 6), strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_each_resample_is_measured_as_its_rows_would_be() -> None:
    labels, top = random(40)
    drawn = np.random.default_rng(1).integers(0, 40, (5, 40))
    weights = np.stack([np.bincount(each, minlength=40) for each in drawn])

    def grouped(column: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
        return np.stack([np.bincount(groups, column * weight, count) for weight in weights])

    found = resampled(grouped, top, labels, 6)
    for i, rows in enumerate(drawn):
        precision, recall, f1, support = precision_recall_fscore_support(labels[rows], top[rows], labels=range(6), zero_division=0.0)
        there = support > 0
        np.testing.assert_allclose(found.precision[i], precision)
        np.testing.assert_allclose(found.recall[i][there], recall[there])
        np.testing.assert_allclose(found.f1[i][there], f1[there])
        assert np.isnan(found.f1[i][~there]).all()
        assert found.macro_f1[i] == pytest.approx(f1[there].mean())


def test_it_takes_what_the_resampler_gives() -> None:
    labels, top = random()
    found = resampled(Resampler(np.arange(200)).grouped, top, labels, 6)
    assert found.f1.shape == (2000, 6)
    assert np.nanmean(found.macro_f1) == pytest.approx(per_class(top, labels, 6).macro_f1, abs=0.02)


def test_groups_are_those_of_the_data() -> None:
    counts = np.array([101, 100, 20, 19, 1, 0, 5000])
    group = group_of(counts, HEAD, FEW)
    assert [GROUPS[i] for i in group] == ["head", "medium", "medium", "tail", "tail", "never seen", "head"]
    known = profile(counts)
    for number, key in enumerate(("head", "medium", "few")):
        assert (group == number).sum() == known[key]["classes"]  # type: ignore[literal-required]
        assert counts[group == number].sum() == known[key]["labels"]  # type: ignore[literal-required]
