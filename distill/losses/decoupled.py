"""Decoupled distillation: the true class and the others have a weight each."""

import torch
from torch import Tensor

from distill.losses.base import Divergence
from distill.losses.divergence import forward_kl
from distill.schedule import Schedule
from distill.types import ConfigError


def decoupled_kd(student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """Decoupled knowledge distillation, `α TCKD + β NCKD`, with p the teacher, q the student, y the label.

    `TCKD = KL((p_y, 1 − p_y) ‖ (q_y, 1 − q_y))` is about the true class against the rest, `NCKD = KL(p̂ ‖ q̂)` about the rest among
    themselves, `p̂_v = p_v / (1 − p_y)` for v ≠ y. Plain distillation is `KL(p ‖ q) = TCKD + (1 − p_y) NCKD`: where the teacher is sure, it
    hardly says which wrong classes are nearly right, and a β of its own lets it. `1 − p_y` is the log-sum of the others, exact for a
    p_y that rounds to 1.

    Args:
        student_logp_NV: `[N, V]`, log q in nats.
        teacher_logp_NV: `[N, V]`, log p in nats.
        labels_N: `[N]`, y in [0, V).
        alpha: weight of TCKD, ≥ 0.
        beta: weight of NCKD, ≥ 0.

    Returns:
        `[N]`, nats, in [0, ∞); with two classes α TCKD, with one 0.

    Reference:
        Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679, equations 6 and 7.
    """
    if student_logp_NV.shape[-1] < 2:
        return 0.0 * student_logp_NV.sum(-1)
    (s_target, s_rest), (t_target, t_rest) = _split(student_logp_NV, labels_N), _split(teacher_logp_NV, labels_N)
    return alpha * forward_kl(s_target, t_target) + beta * forward_kl(s_rest, t_rest)


def _split(logp_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[N, 2]` of the label and of anything else, and `[N, V − 1]` of the others among themselves."""
    target, first = labels_N[:, None], logp_NV[:, :1]
    # class 0 takes the place of the label, which drops out; the order of the others does not matter to a divergence
    place = (target - 1).clamp(min=0)
    others = logp_NV[:, 1:].scatter(-1, place, torch.where(target == 0, logp_NV[:, 1:2], first))
    return torch.cat([logp_NV.gather(-1, target), others.logsumexp(-1, keepdim=True)], -1), others.log_softmax(-1)


class DecoupledKD(Divergence):
    """`T² (α TCKD + β NCKD)` of the softened distributions, see `decoupled_kd`.

    Args:
        alpha: weight of the true class against the rest, ≥ 0.
        beta: weight of the other classes among themselves, ≥ 0; the authors' configurations have 2 to 8 for CIFAR-100 and
            0.5 to 2 for ImageNet.
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: a weight is negative or both are 0, or T is out of range.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        if not (0 <= alpha < float("inf") and 0 <= beta < float("inf") and alpha + beta > 0):
            raise ConfigError(
                f"alpha and beta must be ≥ 0 and not both 0, got {alpha} and {beta}; they weigh the true class and the others"
            )
        self.alpha, self.beta = alpha, beta

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate `decoupled_kd`."""
        return decoupled_kd(student_logp_NV, teacher_logp_NV, labels_N, self.alpha, self.beta)
