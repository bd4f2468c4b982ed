"""How close a student is to its teacher, beyond which answers are right; the divergences themselves are in `losses/divergence.py`."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def entropy(logp_NV: Tensor, probs_NV: Tensor) -> Tensor:
    """How undecided a model is, `H(q) = −Σ_v q_v log q_v`.

    Args:
        logp_NV: `[N, V]`, log q in nats; finite.
        probs_NV: `[N, V]`, q.

    Returns:
        `[N]`, nats, in [0, log V].
    """
    return -(probs_NV * logp_NV).sum(-1)


def divergences(logp_NV: Tensor, probs_NV: Tensor, teacher_logp_NV: Tensor, teacher_probs_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Both Kullback–Leibler divergences at once, `KL(p ‖ q)` and `KL(q ‖ p)`, p the teacher's and q the student's.

    Evaluated as `Σ_v p_v d_v + q_v − p_v` and `Σ_v −q_v d_v − q_v + p_v` with `d = log p − log q`: every summand is ≥ 0,
    and the rounding of the normalisers cancels, as in `losses/divergence.py`. Here both share `q − p` and d, and the exponentials.

    Args:
        logp_NV: `[N, V]`, log q in nats.
        probs_NV: `[N, V]`, q.
        teacher_logp_NV: `[N, V]`, log p in nats.
        teacher_probs_NV: `[N, V]`, p.

    Returns:
        `[N]` each, nats, in [0, ∞).
    """
    ratio, difference = teacher_logp_NV - logp_NV, probs_NV - teacher_probs_NV
    return difference.addcmul(teacher_probs_NV, ratio).sum(-1), -difference.addcmul(probs_NV, ratio).sum(-1)


def overlap(top_NK: Tensor, teacher_top_NK: Tensor) -> Tensor:
    """Share of the teacher's k likeliest classes that are among the student's k likeliest, `|A ∩ B| / k`.

    Args:
        top_NK: `[N, k]`, the student's, in any order.
        teacher_top_NK: `[N, k]`, the teacher's.

    Returns:
        `[N]`, in [0, 1].
    """
    return (top_NK[:, :, None] == teacher_top_NK[:, None, :]).any(-1).float().mean(-1)


def wrong_ranks(logp_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Rank the wrong classes of each position, ties averaged, about their mean rank; the label's own is 0.

    Args:
        logp_NV: `[N, V]`, any increasing function of the probabilities.
        labels_N: `[N]`.

    Returns:
        `[N, V]`, float32, from 1 − V/2 to V/2 − 1.
    """
    num_classes = logp_NV.shape[-1]
    # the label is put above all others, where it shifts no rank
    values, order = _sorted(logp_NV.scatter(-1, labels_N[:, None], torch.inf))
    place = torch.arange(1, num_classes + 1, device=values.device, dtype=torch.float32).expand_as(values)
    step = values[:, 1:] != values[:, :-1]
    edge = torch.ones_like(step[:, :1])
    first = place.masked_fill(~torch.cat([edge, step], -1), 0).cummax(-1).values
    last = place.masked_fill(~torch.cat([step, edge], -1), num_classes).flip(-1).cummin(-1).values.flip(-1)
    ranks = torch.empty_like(first).scatter_(-1, order, (first + last - num_classes) / 2)
    return ranks.scatter_(-1, labels_N[:, None], 0.0)


def _sorted(values_NV: Tensor) -> tuple[Tensor, Tensor]:
    if values_NV.device.type != "cpu":
        values, order = values_NV.sort(-1)
        return values, order
    order = torch.from_numpy(np.argsort(values_NV.numpy(), -1))  # three times as fast as torch's there
    return values_NV.gather(-1, order), order


def rank_correlation(ranks_NV: Tensor, teacher_ranks_NV: Tensor) -> Tensor:
    """Spearman's ρ of the wrong classes: what is kept of the dark knowledge, whatever the temperature.

    `ρ = Σ_v r_v s_v / √(Σ_v r_v² · Σ_v s_v²)` over all classes but the label, r and s the ranks about their means.

    Args:
        ranks_NV: `[N, V]`, of the student, see `wrong_ranks`.
        teacher_ranks_NV: `[N, V]`, of the teacher.

    Returns:
        `[N]`, float64, in [−1, 1]; NaN where all wrong classes of one side are equally likely, e.g. where there is only one.

    Reference:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, of what lies in the ratios of small probabilities; Spearman 1904, of ρ.
    """
    both, ours, theirs = (
        (a * b).sum(-1, dtype=torch.float64)
        for a, b in ((ranks_NV, teacher_ranks_NV), (ranks_NV, ranks_NV), (teacher_ranks_NV, teacher_ranks_NV))
    )
    return both / (ours * theirs).sqrt()


class OfMistakes(NamedTuple):
    """What a student answers where its teacher is wrong, `[N]` each; exactly one holds at each mistake, none elsewhere.

    Attributes:
        same: the teacher's wrong answer.
        right: the label.
        other: another wrong answer.
    """

    same: Bools
    right: Bools
    other: Bools


def of_mistakes(top: Ints, teacher_top: Ints, labels: Ints) -> OfMistakes:
    """Tell what a student answers where its teacher is wrong.

    Args:
        top: `[N]`, the student's likeliest class.
        teacher_top: `[N]`, the teacher's.
        labels: `[N]`.
    """
    wrong = teacher_top != labels
    same, right = wrong & (top == teacher_top), wrong & (top == labels)
    return OfMistakes(same, right, wrong & ~same & ~right)
