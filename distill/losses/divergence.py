"""Divergences between the teacher's and the student's distribution."""

from typing import Any

import torch
from torch import Tensor

from distill.losses.base import Divergence


def forward_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Kullback–Leibler divergence from the student to the teacher, `KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)`.

    p is the teacher, q the student: mass-covering, the usual choice of distillation. Evaluated as
    `Σ_v p_v (log p_v − log q_v) − p_v + q_v`, which is the same where both sum to 1, but every summand is ≥ 0 and of second order in
    the difference: the rounding of the two normalisers, which would be larger than the divergence of close distributions, cancels.

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        teacher_logp_NV: `[N, V]`, log p in nats.

    Returns:
        `[N]`, nats, in [0, ∞).

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    value: Tensor = _ForwardKL.apply(student_logp_NV, teacher_logp_NV)
    return value


class _ForwardKL(torch.autograd.Function):
    """The formula above with its gradient, `q − p` for log q and `p (log p − log q)` for log p: one buffer is kept, not six."""

    @staticmethod
    def forward(ctx: Any, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        p = teacher_logp.exp()
        difference = student_logp.exp().sub_(p)
        weighted = p.mul_(teacher_logp - student_logp)
        ctx.save_for_backward(difference, weighted if ctx.needs_input_grad[1] else None)
        return weighted.add(difference).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        difference, weighted = ctx.saved_tensors
        return difference * grad[:, None], None if weighted is None else weighted * grad[:, None]


class ForwardKL(Divergence):
    """`T² KL(p_T ‖ q_T)`, see `forward_kl`."""

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `forward_kl`."""
        return forward_kl(student_logp_NV, teacher_logp_NV)
