"""What a loss is: `TokenLoss` for terms on distributions, `Divergence` for those between teacher and student, `Loss` for taps."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from distill.layers import Layers
from distill.losses.support import Distribution, Side
from distill.schedule import Schedule, as_schedule
from distill.types import Batch, ConfigError, Outputs, Support, Target


@dataclass(frozen=True)
class Setting:
    """What a term may have to know before the first step: where it stands, the data, and the layers of both models.

    Attributes:
        key: of the term in the configuration, e.g. `model.losses.kd`, for messages.
        unit: what one valid position is: `token` or `sample`.
        num_classes: V.
        class_counts: gives how often each class is a label of the training data, `[V]`, whole numbers; counted when first asked for.
        class_name: gives the name of a class, for messages.
        num_samples: rows of the training data.
        batch_size: rows in a global batch, of all ranks and micro-batches.
        micro_batch: rows in a micro-batch.
        packed: whether a row may hold several documents.
        student: the student's layers.
        teacher: the teacher's, or None where there is no teacher, or one that shows no layers.
        target_temperature: the T that the teacher's target was made with, where it cannot be softened after; None elsewhere.
    """

    key: str
    unit: str
    num_classes: int
    class_counts: Callable[[], Tensor]
    class_name: Callable[[int], str]
    num_samples: int
    batch_size: int
    micro_batch: int
    packed: bool
    student: Layers
    teacher: Layers | None = None
    target_temperature: float | None = None

    def layers_of_teacher(self) -> Layers:
        """Give the teacher's layers.

        Raises:
            ConfigError: it shows none.
        """
        if self.teacher is None:
            raise ConfigError(
                f"{self.key} compares layers, but model.teacher shows none; leave the term out, or take a teacher with layers, e.g. "
                "OnlineTeacher, or RemoteTeacher for one in another process"
            )
        return self.teacher


class Term(nn.Module):
    """A named term of the objective. Every term gives a sum over valid positions; the module divides once, by their global count.

    Attributes:
        needs_teacher: whether it compares with a teacher.
        regulariser: whether it only keeps a student in bounds and teaches it nothing, e.g. a z-loss.
        supports: which kinds of target it is right on. `bins` for a formula that holds on groups of classes, and is then a bound;
            `draws` for one that is linear in the teacher's probabilities up to a constant, so that an unbiased estimate gives an
            unbiased gradient; `text` for one that compares texts, not classes.
    """

    needs_teacher: bool = True
    regulariser: bool = False
    supports: frozenset[Support] = frozenset({"classes"})

    def prepare(self, setting: Setting) -> None:
        """Look at the data and the models before the optimizer is made: choose layers, make projectors, count classes, refuse mistakes.

        May be called again with the same setting, and then changes nothing.

        Raises:
            ConfigError: the term cannot work in this setting; the message names `setting.key`.
        """

    def at(self, step: int, total: int) -> None:
        """Move schedules to optimizer step `step` of `total`; called before every training step."""

    def scheduled(self) -> dict[str, float]:
        """Give the current values of schedules, for the log."""
        return {}

    def summary(self) -> list[str]:
        """Say in a few lines what `prepare` has settled, e.g. which layer is matched with which; for the banner and the report."""
        return []


class TokenLoss(Term, ABC):
    """A term that sees aligned, flattened, valid positions only: no masks, no chunks, no padding of the vocabulary."""

    @abstractmethod
    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Evaluate the term at every position.

        Args:
            student: N distributions over V classes, in float32: `student.logp(T)` is `[N, V]`, in nats.
            teacher: the teacher's, on the same support; receives no gradient. None where there is no teacher.
            labels_N: `[N]`, the class of each position.

        Returns:
            `[N]`, nats per position.
        """

    def with_gradient(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the term and its gradient with respect to the student's logits, for a class that knows it in closed form.

        Optional: without it autograd finds the gradient of `forward`, and takes about twice as long. It serves the class that defines it;
        a subclass with another `forward` or `divergence` is left to autograd unless it brings its own.

        Returns:
            The values of `forward`, `[N]`, and the gradient, `[N, V]`: a tensor of its own, which the caller changes.
        """
        raise NotImplementedError

    def along_probs(self, student: Distribution, teacher: Side | None, labels_N: Tensor) -> "AlongProbs | None":
        """Evaluate the term where its gradient is the student's probabilities but for a few classes; None where it is not.

        Optional, beside `with_gradient`: such terms share one pass over the classes. Of both sides as they come, not on one support.
        """
        return None


class AlongProbs(NamedTuple):
    """The values of a term, and its gradient with respect to the student's logits, `∂L_n / ∂z_v = a_n q_v − Σ_k [ids_k = v] amounts_k`.

    Attributes:
        values: `[N]`, nats.
        factor: `[N]`, a, or one number for all.
        ids: `[N, K]`, classes, in [0, V).
        amounts: `[N, K]`.
        temperature: T of `q = softmax(z / T)`.
    """

    values: Tensor
    factor: Tensor | float
    ids: Tensor
    amounts: Tensor
    temperature: float


class Divergence(TokenLoss):
    """A divergence between teacher and student, both softened by a temperature T > 0 and multiplied by T².

    `T² · D(softmax(z_t / T), softmax(z_s / T))`: T² keeps the gradient's size about independent of T (Hinton et al. 2015,
    arXiv 1503.02531, section 2). It multiplies the value that is differentiated, so it is in the gradient as in the print.

    Args:
        temperature: T > 0, a number or a schedule.
        t_squared: whether to multiply by T².

    Raises:
        ConfigError: T is not positive, or the schedule is made for a term without T².
    """

    def __init__(self, temperature: float | Schedule = 1.0, t_squared: bool = True) -> None:
        super().__init__()
        self.temperature = as_schedule(temperature)
        self.t_squared = t_squared
        if t_squared and not self.temperature.with_t_squared:
            raise ConfigError(f"temperature: {type(self.temperature).__name__} holds only without the factor T²; set t_squared: false")
        self.at(1, 1)  # ramps go one way: what is right at the end and at the start is right between
        self.at(0, 1)

    def prepare(self, setting: Setting) -> None:
        """Tell the schedule the batch, and compare T with that of the target."""
        self.temperature.prepare(setting.batch_size)
        fixed = setting.target_temperature
        for step in (1, 0):
            self.at(step, 1)
            if fixed not in (None, self.T):
                raise ConfigError(
                    f"{setting.key}.temperature is {self.T:g}, but the teacher's target was made with {fixed:g}, and cannot be softened "
                    f"after; set {setting.key}.temperature={fixed:g}, or make the target anew"
                )

    def at(self, step: int, total: int) -> None:
        """Set T for this step."""
        self.T = self.temperature(step, total)
        if not 0 < self.T < float("inf"):
            raise ConfigError(f"temperature must be > 0, got {self.T}; use 1.0 for none")

    def scheduled(self) -> dict[str, float]:
        """Give T."""
        return {"temperature": self.T}

    @property
    def factor(self) -> float:
        """T², or 1 without it."""
        return self.T**2 if self.t_squared else 1.0

    @abstractmethod
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Evaluate D at every position, `[N]` in nats, on log-probabilities that are already softened."""

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        """Soften both sides, evaluate, multiply by T²."""
        value = self.divergence(student.logp(self.T), teacher.logp(self.T), labels_N)
        return value * self.factor


class Loss(Term, ABC):
    """A term that needs intermediate activations, e.g. features and attention.

    Attributes:
        student_taps: what it wants of the student, by the names of `tasks.record`, in `student.taps`; known after `prepare`.
        teacher_taps: the same of the teacher.
        on_features: whether it reads the student's features, and applies its head itself.
        additive: whether the sum over a batch is the sum over its parts. False for terms that compare the samples of a micro-batch
            with each other; those depend on how the batch is cut.
    """

    supports = frozenset({"classes", "bins", "draws"})  # taps belong to positions, whatever is known of the classes
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    on_features: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @abstractmethod
    def forward(self, student: Outputs, teacher: Target, batch: Batch) -> Tensor:
        """Give the sum over valid positions, a scalar; padding must not count. There is a teacher unless `needs_teacher` is False."""
