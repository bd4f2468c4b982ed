"""The generalised Jensen–Shannon divergence, between forward and reverse KL."""

from typing import Any

import torch
from torch import Tensor

from distill.losses.base import Divergence
from distill.losses.divergence import forward_kl, pinned, reverse_kl
from distill.losses.skew import log_mixture_share
from distill.schedule import Schedule
from distill.types import ConfigError


def jensen_shannon(student_logp_NV: Tensor, teacher_logp_NV: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence, `β KL(p ‖ m) + (1 − β) KL(q ‖ m)` with `m = β p + (1 − β) q`, p the teacher, q the student.

    β = 0.5 is the symmetric one. β = 0 gives `KL(p ‖ q)`, forward, and β = 1 gives `KL(q ‖ p)`, reverse, as TRL's
    `generalized_jsd_loss` does. These are the limits of the divergence divided by β, and by 1 − β: the formula itself is 0 at both
    ends, so that at β = 0.01 value and gradient are about a hundredth of those at β = 0. Close to an end, raise the term's weight.

    Args:
        student_logp_NV: `[N, V]`, log q in nats, of a log-softmax; the gradient is given up to a multiple of q, see `pinned`.
        teacher_logp_NV: `[N, V]`, log p in nats.
        beta: in [0, 1], how much of the teacher is in the mixture.

    Returns:
        `[N]`, nats, in [0, −β log β − (1 − β) log(1 − β)], at most log 2; in [0, ∞) where β is 0 or 1.

    Reference:
        Agarwal et al. 2023, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD), arXiv 2306.13649,
        equation 1.
    """
    if beta == 0:
        return forward_kl(student_logp_NV, teacher_logp_NV)
    if beta == 1:
        return reverse_kl(student_logp_NV, teacher_logp_NV)
    value: Tensor = _JensenShannon.apply(student_logp_NV, teacher_logp_NV, beta)
    return value


class _JensenShannon(torch.autograd.Function):
    """The value is the sum of its own gradients, `(1 − β) q log(q / m)` for log q and `β p log(p / m)` for log p."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
        p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
        share = log_mixture_share(log_ratio, beta)
        of_q = (-log_ratio).relu_().add_(share).mul_(q).mul_(beta - 1)
        of_p = log_ratio.relu_().add_(share).mul_(p).mul_(-beta)
        value = (of_q + of_p).sum(-1)
        for_q, for_p, _ = ctx.needs_input_grad
        ctx.save_for_backward(pinned(of_q, q) if for_q else None, pinned(of_p, p) if for_p else None)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if each is None else each * grad[:, None] for each in ctx.saved_tensors), None


class JensenShannon(Divergence):
    """`T² JSD_β(p_T, q_T)`, see `jensen_shannon`.

    Args:
        beta: in [0, 1]; 0 is forward KL, 0.5 the symmetric divergence, 1 reverse KL.
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: beta or T is out of range.
    """

    supports = frozenset({"classes", "bins"})

    def __init__(self, beta: float = 0.5, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta must be in [0, 1], got {beta}; 0 is forward KL, 0.5 the symmetric divergence, 1 reverse KL")
        self.beta = beta

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `jensen_shannon`."""
        return jensen_shannon(student_logp_NV, teacher_logp_NV, self.beta)
