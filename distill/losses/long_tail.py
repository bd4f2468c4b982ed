"""Losses for classes of very different frequency, beyond a weight per position."""

from abc import ABC

import torch
from torch import Tensor

from distill.losses.base import Setting, TokenLoss
from distill.losses.class_weighted import ClassWeights, EffectiveNumber, PerClass, occurrences
from distill.losses.divergence import ForwardKL
from distill.losses.hard import cross_entropy
from distill.losses.support import Distribution
from distill.schedule import Schedule
from distill.types import ConfigError


def log_prior(setting: Setting) -> Tensor:
    """Logarithm of each class's share of the labels, `log π_v = log (n_v / Σ n)`: `[V]`, float64, nats; see `occurrences`."""
    counts = occurrences(setting).double()
    return (counts / counts.sum()).log()


def by_frequency(counts_V: Tensor, groups: int) -> list[Tensor]:
    """Cut the classes into groups of (nearly) equally many, from the most frequent to the rarest; ties in the order of the classes.

    Args:
        counts_V: `[V]`, how often each class occurs.
        groups: how many; never more than there are classes.

    Returns:
        The classes of each group.
    """
    groups = min(groups, len(counts_V))
    borders = [round(len(counts_V) * g / groups) for g in range(1, groups)]
    return list(counts_V.argsort(descending=True, stable=True).tensor_split(borders))


class LogitAdjusted(TokenLoss):
    """Cross-entropy of logits that the class prior has been added to, `−log softmax(z + τ log π)_y`. Needs no teacher.

    The student learns what to add to the prior, so its own softmax(z), taken without the adjustment, is fair to rare classes:
    τ = 1 is consistent for the balanced error.

    Args:
        tau: τ ≥ 0; 0 is `CrossEntropy`.

    Raises:
        ConfigError: τ is negative.

    Reference:
        Menon, Jayasumana, Rawat, Jain, Veit, Kumar 2020, "Long-tail learning via logit adjustment", arXiv 2007.07314, equation 10.
    """

    needs_teacher = False

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        if not 0 <= tau < float("inf"):
            raise ConfigError(f"LogitAdjusted: tau must be at least 0, got {tau}; 1 aims at the balanced error, 0 adjusts nothing")
        self.tau, self.log_prior = tau, PerClass()

    def prepare(self, setting: Setting) -> None:
        """Count the classes."""
        self.log_prior.set(log_prior(setting))

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate the cross-entropy of the adjusted logits."""
        logits = student.logits_NV
        return cross_entropy((logits + self.tau * self.log_prior.like(logits)).log_softmax(-1), labels_N)


class BalancedSoftmax(LogitAdjusted):
    """`−log (n_y exp z_y / Σ_v n_v exp z_v)`: the same as `LogitAdjusted` at τ = 1, by the name of another paper.

    Reference:
        Ren, Yu, Sheng, Ma, Zhao, Yi, Li 2020, "Balanced Meta-Softmax for Long-Tailed Visual Recognition", arXiv 2007.10740, theorem 1
        and equation 4.
    """

    def __init__(self) -> None:
        super().__init__(tau=1.0)


class _ToCorrectedTeacher(TokenLoss, ABC):
    """A term made of softened KL divergences to a teacher that is corrected first; no `Divergence`, as it is not 0 at the teacher."""

    def __init__(self, temperature: float | Schedule, t_squared: bool) -> None:
        super().__init__()
        self.kl = ForwardKL(temperature, t_squared)

    def prepare(self, setting: Setting) -> None:
        self.kl.prepare(setting)

    def at(self, step: int, total: int) -> None:
        """Set T for this step."""
        self.kl.at(step, total)

    def scheduled(self) -> dict[str, float]:
        """Give T."""
        return self.kl.scheduled()


class BalancedKD(_ToCorrectedTeacher):
    """`T² KL(p̂ ‖ q_T)` with the teacher's soft targets weighted per class and normalised again, `p̂_v = w_v p_v / Σ_u w_u p_u`.

    p and q_T are the teacher's and the student's `softmax(z / T)`, w class-balanced weights; as p̂ is normalised, their scale is of no
    account. The paper's recipe is this term beside an unweighted `CrossEntropy`: the hard term learns features from all samples alike,
    this one leads to the rare classes. As in the authors' code (normalised; β = 0.9999, no cap; T² outside); of the deferred schedule in
    it, by which for CIFAR-10 the weights set in late in training, nothing is here.

    Args:
        class_weights: w; None for `EffectiveNumber(beta=0.9999)` without a cap.
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Reference:
        Zhang, Chen, Hu, Peng 2021, "Balanced Knowledge Distillation for Long-tailed Learning", arXiv 2104.10510; code
        github.com/EricZsy/BalancedKnowledgeDistillation, `BKDLoss`.
    """

    def __init__(self, class_weights: ClassWeights | None = None, temperature: float | Schedule = 2.0, t_squared: bool = True) -> None:
        super().__init__(temperature, t_squared)
        self.class_weights, self.log_w = class_weights or EffectiveNumber(0.9999, cap=None), PerClass()

    def prepare(self, setting: Setting) -> None:
        """Count the classes, and tell the schedule the batch."""
        super().prepare(setting)
        self.log_w.set(self.class_weights.of(setting).log())

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate the divergence from the weighted teacher: at T, logits `z + T log w` are `softmax(z / T)` times w, normalised."""
        logits = teacher.logits_NV
        value: Tensor = self.kl(student, Distribution(logits + self.kl.T * self.log_w.like(logits)), labels_N)
        return value


class LTKD(_ToCorrectedTeacher):
    """KL divergence taken apart into groups of classes, head to tail, and put together without the teacher's bias for the head.

    The classes are cut by frequency into groups G of equally many. With `p_G = Σ_{v∈G} p_v` and `p_{v|G} = p_v / p_G`, both softened,
    `KL(p ‖ q) = KL(p_G ‖ q_G) + Σ_G p_G KL(p_{·|G} ‖ q_{·|G})` exactly. Instead of this, the term is

        `T² (α KL(p̂_G ‖ q_G) + β Σ_G KL(p_{·|G} ‖ q_{·|G}))`,   `p̂_G ∝ p_G / m_G`:

    the groups' masses are divided by what the teacher gives them on average, so that none is preferred, and each group's inner divergence
    counts alike, instead of by the teacher's trust in the group.

    From the paper: the decomposition, thirds of the classes, dividing by the mean mass and normalising, equal inner weights, α and β. Ours:
    m_G. The paper takes the mean over the micro-batch, which would make the value depend on how the batch is cut and is noisy where that is
    small; here `m_G = Σ_{v∈G} π_v^(1/T) / Σ_v π_v^(1/T)`, the softened prior π of the training labels, to which at T = 1 the mean over the
    training data of a calibrated teacher is equal, and for T > 1 an approximation. Read from summaries of the paper, not from its text:
    equation numbers, and the authors' α and β, are not known here.

    Args:
        temperature: T > 0, a number or a schedule.
        alpha: α ≥ 0, of the divergence between the groups' masses.
        beta: β ≥ 0, of the divergences inside the groups.
        groups: how many; fewer where there are fewer classes.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: a number is out of range.

    Reference:
        Kim 2025, "Biased Teacher, Balanced Student" (CVPR 2026: "Distilling Balanced Knowledge from a Biased Teacher"), arXiv 2506.18496.
    """

    order_V: Tensor  # noqa: N815

    def __init__(
        self, temperature: float | Schedule = 1.0, alpha: float = 1.0, beta: float = 1.0, groups: int = 3, t_squared: bool = True
    ) -> None:
        super().__init__(temperature, t_squared)
        if not (alpha >= 0 and beta >= 0 and alpha + beta > 0) or groups < 1:
            raise ConfigError(f"LTKD: want alpha, beta ≥ 0, not both 0, and groups ≥ 1, got {alpha}, {beta} and {groups}")
        self.alpha, self.beta, self.groups, self.sizes, self.log_prior = alpha, beta, groups, [0], PerClass()
        self.register_buffer("order_V", torch.empty(0, dtype=torch.long), persistent=False)

    def prepare(self, setting: Setting) -> None:
        """Count the classes, and cut them into groups."""
        super().prepare(setting)
        parts = by_frequency(setting.class_counts(), self.groups)
        self.sizes, order = [len(part) for part in parts], torch.cat(parts)
        self.order_V = order.to(self.order_V.device)
        self.log_prior.set(log_prior(setting)[order])

    def summary(self) -> list[str]:
        """Give the groups' sizes and their shares of the labels."""
        shares = [float(part.exp().sum()) for part in self.log_prior.values_V.split(self.sizes)]
        return ["groups: " + ", ".join(f"{n:,} classes with {share:.1%}" for n, share in zip(self.sizes, shares, strict=True))]

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate both parts; within a group, at T, the distribution is the softmax of its logits alone."""
        ours, theirs = self._grouped(student.logits_NV), self._grouped(teacher.logits_NV)
        prior = self._masses(self.log_prior.like(teacher.logits_NV).split(self.sizes))
        masses = Distribution(self._masses(ours)), Distribution(self._masses(theirs) - prior)
        value: Tensor = self.alpha * self.kl(*masses, labels_N)
        for s, t in zip(ours, theirs, strict=True):
            value = value + self.beta * self.kl(Distribution(s), Distribution(t), labels_N)
        return value

    def _grouped(self, logits_NV: Tensor) -> tuple[Tensor, ...]:
        return logits_NV[:, self.order_V].split(self.sizes, dim=-1)

    def _masses(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The groups' masses at T as logits, `T log Σ_{v∈G} exp(z_v / T)`: `[..., G]`."""
        return torch.stack([self.kl.T * (part / self.kl.T).logsumexp(-1) for part in parts], dim=-1)
