"""What a classifier does class by class, and by groups of classes: seldom seen ones are where a student loses first."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GROUPS = ("head", "medium", "tail", "never seen")
"""In the order of their numbers."""


class PerClass(NamedTuple):
    """Figures of each class, `[..., V]`.

    Attributes:
        precision: of those predicted to be of the class, the share that is; 0 where none is predicted.
        recall: of those of the class, the share that is predicted to be; NaN where there is none.
        f1: their harmonic mean, `2 tp / (2 tp + fp + fn)`; NaN where there is none of the class.
        support: how many there are of the class.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    support: Floats

    @property
    def macro_f1(self) -> Floats:
        """The mean F1 of the classes that there are: each counts the same, however rare."""
        return _mean(self.f1)

    @property
    def balanced_accuracy(self) -> Floats:
        """The mean recall of the classes that there are (scikit-learn's `balanced_accuracy_score`)."""
        return _mean(self.recall)


def per_class(top: Ints, labels: Ints, num_classes: int) -> PerClass:
    """Measure each class, by scikit-learn.

    Args:
        top: `[N]`, the likeliest class.
        labels: `[N]`, the right one.
        num_classes: V.
    """
    found = precision_recall_fscore_support(labels, top, labels=range(num_classes), zero_division=0.0)
    precision, recall, f1, support = (np.asarray(each, np.float64) for each in found)
    return PerClass(precision, np.where(support > 0, recall, np.nan), np.where(support > 0, f1, np.nan), support)


def per_class_of_sums(true_positives: Floats, predicted: Floats, support: Floats) -> PerClass:
    """Measure each class from sums, which a resample has too: `tp / predicted`, `tp / support`, `2 tp / (predicted + support)`.

    Args:
        true_positives: `[..., V]`, those of the class that are predicted to be.
        predicted: `[..., V]`, all that are.
        support: `[..., V]`, all of the class.
    """
    f1 = np.where(support > 0, _over(2 * true_positives, predicted + support), np.nan)
    return PerClass(np.nan_to_num(_over(true_positives, predicted)), _over(true_positives, support), f1, support)


def resampled(grouped: Callable[[Floats, Ints, int], Floats], top: Ints, labels: Ints, num_classes: int) -> PerClass:
    """Measure each class of every resample, `[resamples, V]`.

    Args:
        grouped: `Resampler.grouped`.
        top: `[N]`.
        labels: `[N]`.
        num_classes: V.
    """
    right, ones = (top == labels).astype(np.float64), np.ones(len(labels))
    return per_class_of_sums(grouped(right, labels, num_classes), grouped(ones, top, num_classes), grouped(ones, labels, num_classes))


def group_of(counts: Ints, head: int, few: int) -> Ints:
    """Put each class into one of `GROUPS` by how often it was trained on, `[V]`.

    Head: more than `head` labels; medium: `few` to `head`; tail: 1 to `few` − 1; never seen: none.

    Args:
        counts: `[V]`, how often each class is a label of the training rows.
        head: see above.
        few: see above.

    Reference:
        Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World", arXiv 1904.05160, whose limits are 100 and 20.
    """
    return np.select([counts > head, counts >= few, counts > 0], [0, 1, 2], 3).astype(np.int64)


def _over(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)


def _mean(figures: Floats) -> Floats:
    there = ~np.isnan(figures)
    return _over(np.where(there, figures, 0.0).sum(-1), there.sum(-1).astype(np.float64))
