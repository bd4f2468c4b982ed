"""Divergences from a mixture of teacher and student, which stay bounded where one of the two has no mass."""

import math
from typing import Any

import torch
from torch import Tensor

from distill.losses.base import Divergence
from distill.losses.divergence import forward_kl, pinned
from distill.schedule import Schedule
from distill.types import ConfigError


def log_mixture_share(log_ratio: Tensor, weight: float) -> Tensor:
    """How much of a mixture `m = w p + (1 − w) q` there is for the larger of the two, `log(m / max(p, q))`.

    From it follow `log(m / p)`, by adding `relu(log q − log p)`, and `log(m / q)`, by adding `relu(log p − log q)`, exact to rounding
    however close p and q are and however far, where differences from `log m` would lose both. Carries no gradient of its own: it is
    meant for the inside of an autograd Function.

    Args:
        log_ratio: `log q − log p`, any shape, in nats.
        weight: w in [0, 1].

    Returns:
        The same shape, nats, ≤ 0; 0 where q = p.
    """
    of_the_smaller = torch.where(log_ratio > 0, log_ratio.new_tensor(weight), log_ratio.new_tensor(1 - weight))
    share = log_ratio.abs().neg_().expm1_().mul_(of_the_smaller).log1p_()
    if 1e-3 <= weight <= 1 - 1e-3:
        return share
    # where the larger of the two has hardly any weight and the other is far below it, 1 − (1 − w)(1 − q / p) rounds w away
    log_w, log_rest = (log_ratio.new_tensor(math.log(w) if w > 0 else -math.inf) for w in (weight, 1 - weight))
    return torch.where(log_ratio.abs() < 1, share, torch.logaddexp(log_w - log_ratio.relu(), log_rest - (-log_ratio).relu()))


def skew_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, alpha: float = 0.1) -> Tensor:
    """Skew KL divergence, `KL(p ‖ α p + (1 − α) q)`, with p the teacher and q the student.

    At most `−log α`, and its gradient is bounded, where `KL(p ‖ q)` grows without limit as the student forgets a class; α = 0 is
    `forward_kl`. Evaluated with the terms `− p_v + m_v` added, as there.

    Args:
        student_logp_NV: `[N, V]`, log q in nats, of a log-softmax; the gradient is given up to a multiple of q, see `pinned`.
        teacher_logp_NV: `[N, V]`, log p in nats.
        alpha: in [0, 1), how much of p is in the mixture.

    Returns:
        `[N]`, nats, in [0, −log α].

    Reference:
        Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv 2402.03898, section 3.1.
    """
    if alpha == 0:
        return forward_kl(student_logp_NV, teacher_logp_NV)
    value: Tensor = _SkewKL.apply(student_logp_NV, teacher_logp_NV, alpha)
    return value


def skew_reverse_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, alpha: float = 0.1) -> Tensor:
    """Skew reverse KL divergence, `KL(q ‖ (1 − α) p + α q)`: `skew_kl` with teacher and student exchanged; α = 0 is `reverse_kl`.

    Args:
        student_logp_NV: `[N, V]`, log q in nats, of a log-softmax; the gradient is given up to a multiple of q, see `pinned`.
        teacher_logp_NV: `[N, V]`, log p in nats.
        alpha: in [0, 1), how much of q is in the mixture.

    Returns:
        `[N]`, nats, in [0, −log α].

    Reference:
        As `skew_kl`.
    """
    return skew_kl(teacher_logp_NV, student_logp_NV, alpha)


class _SkewKL(torch.autograd.Function):
    """`KL(p ‖ m)`, `m = α p + (1 − α) q`, of (log q, log p) with its gradient; with `s = p q / m`, which is at most p / (1 − α).

    `(1 − α)(q − s)` for log q, `p log(p / m) + (1 − α)(s − p)` for log p.
    """

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
        p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
        share = log_mixture_share(log_ratio, alpha)
        for_q, for_p, _ = ctx.needs_input_grad
        shared = share.add((-log_ratio).relu_()).neg_().exp_().mul_(p)
        weighted = share.add_(log_ratio.relu_()).mul_(p).neg_()
        value = torch.add(weighted, q - p, alpha=1 - alpha).sum(-1)
        ctx.save_for_backward(
            pinned((q - shared).mul_(1 - alpha), q) if for_q else None,
            pinned(weighted.add_(shared.sub_(p), alpha=1 - alpha), p) if for_p else None,
        )
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if each is None else each * grad[:, None] for each in ctx.saved_tensors), None


def _check(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ConfigError(f"alpha must be in [0, 1), got {alpha}; 0.1 is the usual choice, 0 leaves the plain divergence")


class SkewKL(Divergence):
    """`T² KL(p_T ‖ α p_T + (1 − α) q_T)`, see `skew_kl`.

    Args:
        alpha: in [0, 1), how much of the teacher is in the mixture.
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: alpha or T is out of range.
    """

    supports = frozenset({"classes", "bins"})

    def __init__(self, alpha: float = 0.1, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        _check(alpha)
        self.alpha = alpha

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `skew_kl`."""
        return skew_kl(student_logp_NV, teacher_logp_NV, self.alpha)


class SkewReverseKL(Divergence):
    """`T² KL(q_T ‖ (1 − α) p_T + α q_T)`, see `skew_reverse_kl`.

    Args:
        alpha: in [0, 1), how much of the student is in the mixture.
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: alpha or T is out of range.
    """

    supports = frozenset({"classes", "bins"})

    def __init__(self, alpha: float = 0.1, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        _check(alpha)
        self.alpha = alpha

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `skew_reverse_kl`."""
        return skew_reverse_kl(student_logp_NV, teacher_logp_NV, self.alpha)
