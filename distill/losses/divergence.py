"""Divergences between the teacher's and the student's distribution."""

from typing import Any

import torch
from torch import Tensor

from distill.losses.along import kl_to_known
from distill.losses.base import AlongProbs, Divergence
from distill.losses.support import Distribution, Known, Side


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
    value: Tensor = _KL.apply(student_logp_NV, teacher_logp_NV)
    return value


def reverse_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Kullback–Leibler divergence from the teacher to the student, `KL(q ‖ p) = Σ_v q_v (log q_v − log p_v)`.

    p is the teacher, q the student: mode-seeking, the student is punished for mass where the teacher has none, not for what it leaves
    out. Evaluated in the form of `forward_kl`, whose rounding cancels.

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        teacher_logp_NV: `[N, V]`, log p in nats.

    Returns:
        `[N]`, nats, in [0, ∞).

    Reference:
        Gu, Dong, Wei, Huang 2023, "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543; there the
        expectation is over sequences of the student, here over the classes of each position.
    """
    value: Tensor = _KL.apply(teacher_logp_NV, student_logp_NV)
    return value


class _KL(torch.autograd.Function):
    """`KL(p ‖ q)` of (log q, log p) with its gradient, `q − p` for log q and `p (log p − log q)` for log p: one buffer is kept, not six."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor) -> Tensor:
        values, difference, weighted = _kl(log_q, log_p)
        ctx.save_for_backward(
            *(each if wanted else None for each, wanted in zip((difference, weighted), ctx.needs_input_grad, strict=True))
        )
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else each * grad[:, None] for each in ctx.saved_tensors)


def _kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`KL(p ‖ q)`, `q − p` and `p (log p − log q)`."""
    p = log_p.exp()
    difference = log_q.exp().sub_(p)
    weighted = p.mul_(log_p - log_q)
    return weighted.add(difference).sum(-1), difference, weighted


def pinned(gradient_NV: Tensor, probs_NV: Tensor) -> Tensor:
    """Take off a gradient of log q the multiple of q that makes it vanish at the likeliest class; in place.

    The backward of the log-softmax behind log q takes out any multiple of q anyway. Where q is nearly 1 that is a difference of two
    nearly equal numbers, and the rounding of what is left is larger than it; this way nothing large is left to take out.

    Args:
        gradient_NV: `[N, V]`, of a function of log q; changed.
        probs_NV: `[N, V]`, q.

    Returns:
        The first argument.
    """
    top = probs_NV.argmax(-1, keepdim=True)
    factor = gradient_NV.gather(-1, top) / probs_NV.gather(-1, top)
    return gradient_NV.addcmul_(probs_NV, factor, value=-1).scatter_(-1, top, 0.0)


class ForwardKL(Divergence):
    """`T² KL(p_T ‖ q_T)`, see `forward_kl`; its gradient with respect to the student's logits is `T (q_T − p_T)`."""

    supports = frozenset({"classes", "bins", "draws"})

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `forward_kl`."""
        return forward_kl(student_logp_NV, teacher_logp_NV)

    def with_gradient(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate `forward_kl` and its gradient, which passes through the softmax unchanged: q and p have the same sum."""
        values, difference, _ = _kl(student.logp(self.T), teacher.logp(self.T))
        return values * self.factor, student.spread(difference.mul_(self.factor / self.T), self.T)

    def along_probs(self, student: Distribution, teacher: Side | None, labels_N: Tensor) -> AlongProbs | None:
        """Evaluate `kl_to_known` where the target knows a few classes."""
        return kl_to_known(student, teacher, self.T, self.factor) if isinstance(teacher, Known) else None


class ReverseKL(Divergence):
    """`T² KL(q_T ‖ p_T)`, see `reverse_kl`."""

    supports = frozenset({"classes", "bins"})

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `reverse_kl`."""
        return reverse_kl(student_logp_NV, teacher_logp_NV)
