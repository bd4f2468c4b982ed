"""What a loss is: `TokenLoss` for terms on log-probabilities, `Divergence` for those between teacher and student, `Loss` for taps."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from distill.schedule import Schedule, as_schedule
from distill.types import Batch, ConfigError, Outputs


class Term(nn.Module):
    """A named term of the objective. Every term gives a sum over valid positions; the module divides once, by their global count."""

    needs_teacher: ClassVar[bool] = True

    def at(self, step: int, total: int) -> None:
        """Move schedules to optimizer step `step` of `total`; called before every training step."""

    def scheduled(self) -> dict[str, float]:
        """Give the current values of schedules, for the log."""
        return {}


class TokenLoss(Term, ABC):
    """A term that sees aligned, flattened, valid positions only: no masks, no chunks, no padding of the vocabulary."""

    @abstractmethod
    def forward(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate the term at every position.

        Args:
            student_logp_NV: `[N, V]`, float32, log-probabilities at temperature 1, in nats.
            teacher_logp_NV: `[N, V]`, the teacher's, on the same support; receives no gradient. None where there is no teacher.
            labels_N: `[N]`, the class of each position.

        Returns:
            `[N]`, nats per position.
        """


class Divergence(TokenLoss):
    """A divergence between teacher and student, both softened by a temperature T > 0 and multiplied by T².

    `T² · D(softmax(z_t / T), softmax(z_s / T))`: T² keeps the gradient's size about independent of T (Hinton et al. 2015,
    arXiv 1503.02531, section 2.1). It multiplies the value that is differentiated, so it is in the gradient as in the print.

    Args:
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: T is not positive.
    """

    def __init__(self, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__()
        self.temperature = as_schedule(temperature)
        self.t_squared = t_squared
        self.at(0, 1)

    def at(self, step: int, total: int) -> None:
        """Set T for this step."""
        self.T = self.temperature(step, total)
        if not self.T > 0:
            raise ConfigError(f"temperature must be > 0, got {self.T}; use 1.0 for none")

    def scheduled(self) -> dict[str, float]:
        """Give T."""
        return {"temperature": self.T}

    @abstractmethod
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Evaluate D at every position, `[N]` in nats, on log-probabilities that are already softened."""

    def forward(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Soften both sides, evaluate, multiply by T²."""
        value = self.divergence(soften(student_logp_NV, self.T), soften(teacher_logp_NV, self.T))
        return value * self.T**2 if self.t_squared else value


def soften(logp_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at temperature T from those at 1: `log_softmax(logp / T)`, exact because logp is the logits less a constant."""
    return logp_NV if temperature == 1.0 else (logp_NV / temperature).log_softmax(-1)


class Loss(Term, ABC):
    """A term that needs intermediate activations, e.g. features and attention.

    Attributes:
        student_taps: dotted names of the student's submodules whose outputs it wants, in `student.taps`.
        teacher_taps: the same for the teacher.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Give the sum over valid positions, a scalar; padding must not count. There is a teacher unless `needs_teacher` is False."""
