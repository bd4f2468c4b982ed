"""Hard labels."""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import TokenLoss
from distill.losses.support import Distribution


def cross_entropy(student_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy with the true class, `−log q_y`.

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        labels_N: `[N]`, y in [0, V).

    Returns:
        `[N]`, nats, in [0, ∞).
    """
    return F.nll_loss(student_logp_NV, labels_N, reduction="none")


class CrossEntropy(TokenLoss):
    """`−log q_y`, see `cross_entropy`. Needs no teacher."""

    needs_teacher = False

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate `cross_entropy`."""
        return cross_entropy(student.logp(), labels_N)
