"""Dark knowledge as an order: which wrong classes the teacher finds likelier than which, on the likeliest few."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Divergence, TokenLoss
from distill.losses.divergence import forward_kl
from distill.losses.support import Distribution
from distill.schedule import Schedule
from distill.types import ConfigError


def top_wrong(teacher_NV: Tensor, labels_N: Tensor, k: int) -> Tensor:
    """The teacher's k likeliest classes other than the label; of equally likely ones those with the lower number, on every device.

    Args:
        teacher_NV: `[N, V]`, log-probabilities or logits.
        labels_N: `[N]`, in [0, V).
        k: how many, ≥ 1.

    Returns:
        `[N, min(k, V − 1)]`, class numbers in increasing order.
    """
    k = min(k, teacher_NV.shape[-1] - 1)
    if k == 0:
        return labels_N.new_empty(len(labels_N), 0)
    others = teacher_NV.detach().scatter(-1, labels_N[:, None], -math.inf)
    last = others.topk(k).values[:, -1:]
    above, level = others > last, others == last
    fits = level.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True)
    return (above | (level & fits)).nonzero()[:, 1].view(-1, k)


def pairwise_rank(student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor, k: int = 10) -> Tensor:
    """Pairwise ranking with the teacher's preferences as soft targets, the mean over pairs of wrong classes of a binary KL divergence.

    `2 / (K (K − 1)) Σ_{i<j} KL(Bernoulli(σ(t_i − t_j)) ‖ Bernoulli(σ(s_i − s_j)))` over the teacher's K = min(k, V − 1) likeliest classes
    other than the label; t and s are log-probabilities, of which only differences matter. 0 where all differences are the teacher's.

    Args:
        student_logp_NV: `[N, V]`, nats.
        teacher_logp_NV: `[N, V]`, nats.
        labels_N: `[N]`, in [0, V).
        k: classes compared, ≥ 2; of equally likely ones at the end those with the lower number.

    Returns:
        `[N]`, nats per pair, in [0, ∞); 0 where there is no pair.

    Reference:
        Burges et al. 2005, "Learning to Rank using Gradient Descent" (RankNet), ICML, its cost less the entropy of the target.
    """
    chosen = top_wrong(teacher_logp_NV, labels_N, k)
    first, second = torch.combinations(torch.arange(chosen.shape[1], device=chosen.device)).unbind(-1)
    student, teacher = (_preferences(logp.gather(-1, chosen), first, second) for logp in (student_logp_NV, teacher_logp_NV))
    return forward_kl(student, teacher).view(len(chosen), len(first)).sum(-1) / max(1, len(first))


def _preferences(score_NK: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`[N · pairs, 2]`, log-probabilities that the first and that the second of each pair is preferred."""
    difference = (score_NK[:, first] - score_NK[:, second]).flatten()
    return F.logsigmoid(torch.stack([difference, -difference], -1))


def plackett_luce(student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor, k: int = 10) -> Tensor:
    """Plackett–Luce likelihood of the teacher's order, `−log Π_i exp(s_i) / Σ_{j: t_j ≤ t_i} exp(s_j)`, over its likeliest wrong classes.

    The student draws the teacher's K = min(k, V − 1) likeliest classes other than the label one after the other, likeliest first, each
    among those still there. Of equally likely classes each is drawn among all of them (Breslow's rule for ties in Cox's likelihood), so
    that their numbering does not matter. A minimum of 0 is only approached, as the student's scores spread in the right order: it asks
    for the order, not for the teacher's confidence.

    Args:
        student_logp_NV: `[N, V]`, s in nats, up to a constant per position.
        teacher_logp_NV: `[N, V]`, t, of which only the order is used.
        labels_N: `[N]`, in [0, V).
        k: classes ordered, ≥ 2; of equally likely ones at the end those with the lower number.

    Returns:
        `[N]`, nats, in (0, ∞); 0 where there are fewer than two wrong classes.

    Reference:
        Xia, Liu, Wang, Zhang, Li 2008, "Listwise Approach to Learning to Rank: Theory and Algorithm" (ListMLE), ICML.
    """
    chosen = top_wrong(teacher_logp_NV, labels_N, k)
    score, target = student_logp_NV.gather(-1, chosen), teacher_logp_NV.gather(-1, chosen)
    drawn_before = target[:, None, :] > target[:, :, None]
    still_there = score[:, None, :].expand(drawn_before.shape).masked_fill(drawn_before, -math.inf)
    return (still_there.logsumexp(-1) - score).sum(-1)


def _check(k: int) -> None:
    if k < 2:
        raise ConfigError(f"k must be at least 2, got {k}; it is how many wrong classes are compared with each other")


class PairwiseRank(Divergence):
    """`T²` times the mean binary KL of the softened preferences σ((t_i − t_j) / T), see `pairwise_rank`.

    Args:
        k: classes compared, ≥ 2, the teacher's likeliest without the label; the cost goes as k².
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: k or T is out of range.
    """

    def __init__(self, k: int = 10, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        _check(k)
        self.k = k

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `pairwise_rank`."""
        return pairwise_rank(student_logp_NV, teacher_logp_NV, labels_N, self.k)


class PlackettLuce(TokenLoss):
    """`−log P(the teacher's order)`, see `plackett_luce`. Has no temperature: of the teacher only the order is used.

    Args:
        k: classes ordered, ≥ 2, the teacher's likeliest without the label; the cost goes as k².

    Raises:
        ConfigError: k is out of range.
    """

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        _check(k)
        self.k = k

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate `plackett_luce`."""
        return plackett_luce(student.logits_NV, teacher.logits_NV, labels_N, self.k)
