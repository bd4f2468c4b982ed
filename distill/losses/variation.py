"""Total variation: how much probability would have to move."""

from typing import Any

import torch
from torch import Tensor

from distill.losses.base import Divergence
from distill.losses.divergence import pinned


def total_variation(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Total variation distance, `½ Σ_v |p_v − q_v|`, with p the teacher and q the student.

    Symmetric and bounded: a class on which they disagree wildly counts no more than the mass it holds. The gradient does not shrink
    near p = q but jumps there (it is a distance, not a square), and vanishes where q_v does.

    Args:
        student_logp_NV: `[N, V]`, log q in nats, of a log-softmax; the gradient is given up to a multiple of q, see `pinned`.
        teacher_logp_NV: `[N, V]`, log p in nats.

    Returns:
        `[N]`, a share of the mass, in [0, 1].

    Reference:
        Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv 2307.15190,
        section 2.2, equation 9; there between sequences, bounded by the sum of this over positions, averaged over texts of
        the teacher and of the student.
    """
    value: Tensor = _TotalVariation.apply(student_logp_NV, teacher_logp_NV)
    return value


class _TotalVariation(torch.autograd.Function):
    """The formula with its gradient, `½ q sign(q − p)` for log q and `½ p sign(p − q)` for log p; 0 where they are equal."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        difference = q - p
        sides = zip((q, p), (0.5, -0.5), ctx.needs_input_grad, strict=True)
        ctx.save_for_backward(*(pinned(difference.sign().mul_(side).mul_(half), side) if wanted else None for side, half, wanted in sides))
        return difference.abs_().sum(-1).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else each * grad[:, None] for each in ctx.saved_tensors)


class TotalVariation(Divergence):
    """`T² · ½ Σ_v |p_v − q_v|` of the softened distributions, see `total_variation`.

    For large T the distance goes as 1/T and not, as a divergence of second order, as 1/T²: with T² its gradient grows as T. Take T = 1,
    or `t_squared: false` and a weight of the term's own.
    """

    supports = frozenset({"classes", "bins"})

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `total_variation`."""
        return total_variation(student_logp_NV, teacher_logp_NV)
