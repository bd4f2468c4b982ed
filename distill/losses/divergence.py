"""Divergences between the teacher's and the student's distribution."""

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
    p, q = teacher_logp_NV.exp(), student_logp_NV.exp()
    return (p * (teacher_logp_NV - student_logp_NV) - p + q).sum(-1)


class ForwardKL(Divergence):
    """`T² KL(p_T ‖ q_T)`, see `forward_kl`."""

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Evaluate `forward_kl`."""
        return forward_kl(student_logp_NV, teacher_logp_NV)
