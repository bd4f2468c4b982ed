"""Hard labels, and what needs nothing but the student."""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import AlongProbs, Setting, TokenLoss
from distill.losses.class_weighted import ClassWeights, PerClass
from distill.losses.support import Distribution, Side
from distill.types import ConfigError


def cross_entropy(student_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy with the true class, `−log q_y`.

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        labels_N: `[N]`, y in [0, V).

    Returns:
        `[N]`, nats, in [0, ∞).
    """
    return F.nll_loss(student_logp_NV, labels_N, reduction="none")


def uniform_cross_entropy(student_logp_NV: Tensor, weights_V: Tensor | None = None) -> Tensor:
    """Cross-entropy with the uniform distribution, `−(1/V) Σ_v w_v log q_v`: what label smoothing mixes in.

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        weights_V: `[V]`, w_v; None for 1.

    Returns:
        `[N]`, nats, in [0, ∞).

    Reference:
        Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2015, "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567,
        section 7.
    """
    return -(student_logp_NV if weights_V is None else student_logp_NV * weights_V).mean(-1)


class CrossEntropy(TokenLoss):
    """`(1 − ε) w_y (−log q_y) + ε (1/V) Σ_v w_v (−log q_v)`, as `torch.nn.functional.cross_entropy`. Needs no teacher.

    Args:
        label_smoothing: ε in [0, 1).
        class_weights: how w follows from the counts of the classes; None for 1.

    Raises:
        ConfigError: ε is out of range.
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, class_weights: ClassWeights | None = None) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"CrossEntropy: label_smoothing must be in [0, 1), got {label_smoothing}; use 0 for none")
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.w = None if class_weights is None else PerClass()

    def prepare(self, setting: Setting) -> None:
        """Count the classes where they are weighted."""
        if self.w is not None and self.class_weights is not None:
            self.w.set(self.class_weights.of(setting))

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate `cross_entropy`, weigh it, and mix in `uniform_cross_entropy`."""
        logp = student.logp()
        value = cross_entropy(logp, labels_N)
        if self.w is not None:
            value = value * self.w.at(labels_N, logp)
        if self.label_smoothing == 0:
            return value
        smooth = uniform_cross_entropy(logp, None if self.w is None else self.w.like(logp))
        return (1 - self.label_smoothing) * value + self.label_smoothing * smooth

    def with_gradient(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate `forward` and its gradient, `q_v Σ_u g_u − g_v` where g_v is how much `−log q_v` weighs in the value."""
        logp = student.logp()
        of_label = torch.full_like(labels_N, 1 - self.label_smoothing, dtype=logp.dtype)
        if self.w is not None:
            of_label = of_label * self.w.at(labels_N, logp)
        gradient, total = logp.exp(), of_label
        if self.label_smoothing:
            of_each = self.label_smoothing / logp.shape[-1] * (torch.ones_like(logp[0]) if self.w is None else self.w.like(logp))
            total = total + of_each.sum()
            gradient = gradient.mul_(total[:, None]).sub_(of_each)
        elif self.w is not None:
            gradient = gradient.mul_(total[:, None])
        return self(student, teacher, labels_N), gradient.scatter_add_(-1, labels_N[:, None], -of_label[:, None])

    def along_probs(self, student: Distribution, teacher: Side | None, labels_N: Tensor) -> AlongProbs | None:
        """Evaluate `forward` and its gradient, `w_y (q − [v = y])`, where nothing is smoothed."""
        if self.label_smoothing:
            return None
        values, y = self(student, None, labels_N), labels_N[:, None]
        if self.w is None:
            return AlongProbs(values, 1.0, y, torch.ones_like(values)[:, None], 1.0)
        w = self.w.at(labels_N, values)
        return AlongProbs(values, w, y, w[:, None], 1.0)


class ZLoss(TokenLoss):
    """`log² Z` with `Z = Σ_v exp z_v`: keeps the student's logits near normalised, so that they do not drift out of bfloat16's range.

    Give it a small weight, 1e-4 in the paper. Needs no teacher.

    Reference:
        Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", arXiv 2204.02311, section 5.
    """

    needs_teacher = False
    regulariser = True

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Square the logarithm of the softmax's denominator."""
        return student.log_partition().square()
