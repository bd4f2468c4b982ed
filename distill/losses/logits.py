"""Logits matched as they are, without a softmax."""

from torch import Tensor

from distill.losses.base import TokenLoss
from distill.losses.support import Distribution


def logit_mse(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """Mean squared difference of centred logits, `1/V Σ_v (d_v − d̄)²`, `d = s − t`, with s of the student and t of the teacher.

    Logits mean something only up to a constant per position, which a softmax takes out; so does the mean over the classes here, and a
    student is not made to copy the teacher's. T² KL(p_T ‖ q_T) tends to half of this as T → ∞.

    Args:
        student_logits_NV: `[N, V]`, log-probabilities or logits, in nats.
        teacher_logits_NV: `[N, V]`, the same.

    Returns:
        `[N]`, nats², in [0, ∞); 0 with one class.

    Reference:
        Kim, Oh, Kim, Cho, Yun 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", arXiv
        2105.08919 (not centred there); Hinton, Vinyals, Dean 2015, arXiv 1503.02531, equation 4 for the limit.
    """
    difference = student_logits_NV - teacher_logits_NV
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1)


class LogitMSE(TokenLoss):
    """`1/V Σ_v (d_v − d̄)²`, see `logit_mse`. Has no temperature: it is the limit of a high one."""

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate `logit_mse`."""
        return logit_mse(student.logits_NV, teacher.logits_NV)
