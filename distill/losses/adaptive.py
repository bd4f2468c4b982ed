"""Forward and reverse KL, mixed per position by where the student is still wrong."""

import torch
from torch import Tensor

from distill.losses.base import Divergence
from distill.losses.divergence import forward_kl, reverse_kl
from distill.schedule import Schedule
from distill.types import ConfigError


def head_of(logp_NV: Tensor, mu: float) -> Tensor:
    """The head of a distribution: the fewest classes, likeliest first, that hold a mass of mu.

    A class belongs to it if the likelier ones hold less than mu together, so that equally likely classes are all in or all out.

    Args:
        logp_NV: `[N, V]`, nats.
        mu: in (0, 1).

    Returns:
        `[N, V]`, boolean; at least one class of each row is in.
    """
    num_classes = logp_NV.shape[-1]
    k = min(128, num_classes)  # nearly always enough, and far cheaper than to sort the vocabulary
    while True:
        best = logp_NV.topk(k).values
        before_last = best.exp().cumsum(-1) < mu
        if k == num_classes or not before_last[:, -1].any():
            break
        k = min(16 * k, num_classes)
    last = before_last.sum(-1, keepdim=True).clamp(max=k - 1)
    return logp_NV >= best.gather(-1, last)


def adaptive_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, mu: float = 0.5) -> Tensor:
    """Adaptive KL divergence, `w KL(p ‖ q) + (1 − w) KL(q ‖ p)`, `w = g_head / (g_head + g_tail)`, with p the teacher and q the student.

    g is the gap `Σ |p_v − q_v|` over the head of the teacher, the fewest classes that hold a mass of mu, and over the tail, the rest:
    forward KL mends the head first and reverse KL the tail, so each gets the share of the gap that it is good at. No gradient goes
    through w. Equally likely classes are all in the head or all in the tail. (The authors' program leaves
    the class that carries the mass past mu out of the head, unless it is the first.)

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        teacher_logp_NV: `[N, V]`, log p in nats.
        mu: in (0, 1), the mass of the head.

    Returns:
        `[N]`, nats, in [0, ∞).

    Reference:
        Wu, Tao, Wang, Yang, Zhao, Wong 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
        Models" (AKL), arXiv 2404.02657.
    """
    w = _share_of_the_head(student_logp_NV.detach(), teacher_logp_NV.detach(), mu)
    return w * forward_kl(student_logp_NV, teacher_logp_NV) + (1 - w) * reverse_kl(student_logp_NV, teacher_logp_NV)


def _share_of_the_head(student_logp: Tensor, teacher_logp: Tensor, mu: float) -> Tensor:
    gap = (teacher_logp.exp() - student_logp.exp()).abs_()
    everywhere = gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)  # no gap: both divergences are 0, whatever their share
    return gap.mul_(head_of(teacher_logp, mu)).sum(-1) / everywhere


class AdaptiveKL(Divergence):
    """`T² (w KL(p_T ‖ q_T) + (1 − w) KL(q_T ‖ p_T))`, see `adaptive_kl`.

    Args:
        mu: in (0, 1), the mass of the teacher's head.
        temperature: T > 0, a number or a schedule; head and gaps are those of the softened distributions.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: mu or T is out of range.
    """

    def __init__(self, mu: float = 0.5, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        if not 0 < mu < 1:
            raise ConfigError(f"mu must be in (0, 1), got {mu}; it is the mass of the teacher's head, 0.5 in the paper")
        self.mu = mu

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `adaptive_kl`."""
        return adaptive_kl(student_logp_NV, teacher_logp_NV, self.mu)
