"""The dense way: whole logits in float64 and plain autograd, the yardstick of everything that is evaluated chunk by chunk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.layers import Layers
from distill.losses.base import Setting, TokenLoss
from distill.losses.chunked import chunked_objective
from distill.types import IGNORE_INDEX, Outputs

Reference = Callable[..., Tensor]


@dataclass(frozen=True)
class Result:
    """A value with the gradients of the student's features and of its head's weight."""

    value: Tensor
    features: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Case:
    """Random features, bias-free linear heads and labels of a student and a teacher."""

    student_features: Tensor  # [B, T, D]
    student_weight: Tensor  # [V', D]
    teacher_features: Tensor
    teacher_weight: Tensor
    labels: Tensor  # [B, T]
    num_classes: int

    @staticmethod
    def random(
        seed: int = 0,
        shape: tuple[int, int] = (2, 7),
        num_classes: int = 13,
        padding: tuple[int, int] = (3, 5),
        widths: tuple[int, int] = (6, 10),
        mask: str = "some",
        dtype: torch.dtype = torch.float32,
    ) -> "Case":
        """Draw a case whose logits are of order 1; `mask` is none, some, one (a single valid position) or all."""
        rng = torch.Generator().manual_seed(seed)

        def side(width: int, rows: int) -> tuple[Tensor, Tensor]:
            features = torch.randn(*shape, width, generator=rng, dtype=torch.float64)
            weight = torch.randn(rows, width, generator=rng, dtype=torch.float64) * (2 / width**0.5)
            return features.to(dtype), weight.to(dtype)

        labels = torch.randint(num_classes, shape, generator=rng)
        masked = {
            "none": torch.zeros(shape, dtype=torch.bool),
            "some": torch.rand(shape, generator=rng) < 0.4,
            "one": torch.arange(labels.numel()).view(shape) != seed % labels.numel(),
            "all": torch.ones(shape, dtype=torch.bool),
        }[mask]
        student, teacher = side(widths[0], num_classes + padding[0]), side(widths[1], num_classes + padding[1])
        return Case(*student, *teacher, labels.masked_fill(masked, IGNORE_INDEX), num_classes)

    def dense(self, *references: Reference, weights: tuple[float, ...] = (1.0,), rounded: bool = False, **settings: object) -> Result:
        """Evaluate `Σ_i w_i Σ_n reference_i(n)` on whole float64 logits, and differentiate with autograd.

        `rounded` gives the references the logits as a head of the case's dtype gives them (the gradient passes through): what a loss
        makes of its input is then compared, and not what rounding of that input makes of the answer.
        """

        def heard(logits: Tensor) -> Tensor:
            return logits + (logits.to(self.student_features.dtype).double() - logits).detach() if rounded else logits

        features = self.student_features.detach().double().requires_grad_()
        weight = self.student_weight.detach().double().requires_grad_()
        valid = self.labels != IGNORE_INDEX
        logits = (features @ weight.T)[..., : self.num_classes][valid]
        teacher = (self.teacher_features.detach().double() @ self.teacher_weight.detach().double().T)[..., : self.num_classes][valid]
        logits, teacher = heard(logits), heard(teacher)
        parts = [w * r(logits, teacher, self.labels[valid], **settings).sum() for w, r in zip(weights, references, strict=True)]
        value = torch.stack(parts).sum()
        value.backward()
        assert features.grad is not None
        assert weight.grad is not None
        return Result(value.detach(), features.grad, weight.grad)

    def student(self) -> Outputs:
        """Give the student with fresh leaves that want a gradient."""
        return Outputs(self.student_features.clone().requires_grad_(), linear(self.student_weight))

    def teacher(self) -> Outputs:
        """Give the teacher, whose tensors also want a gradient, so that a leak would show."""
        return Outputs(self.teacher_features.clone().requires_grad_(), linear(self.teacher_weight))

    def chunked(self, losses: Mapping[str, TokenLoss] | TokenLoss, weights: Mapping[str, float] | None = None, chunk: int = 4) -> Result:
        """Evaluate the code under test."""
        named = {"it": losses} if isinstance(losses, TokenLoss) else losses
        student = self.student()
        weights = weights or dict.fromkeys(named, 1.0)
        total, _, _ = chunked_objective(student, self.teacher(), self.labels, named, weights, self.num_classes, chunk)
        total.backward()
        weight = next(student.head.parameters())
        assert student.features.grad is not None
        assert weight.grad is not None
        return Result(total.detach(), student.features.grad, weight.grad)


def counts(num_classes: int) -> Tensor:
    """How often each class occurs in the training data of `setting`: from 1 to 50, never 0, in no order."""
    return 1 + (torch.arange(num_classes) * 7) ** 2 % 50


def setting(num_classes: int, unit: str = "sample", **changes: Any) -> Setting:
    """Give what a term is prepared with: `counts`, and models of 2 and 4 layers that need not exist."""
    student = Layers("model.student", ("layers.0", "layers.1"), 6, 2, None, (), "eager")
    teacher = Layers("model.teacher", tuple(f"layers.{i}" for i in range(4)), 10, 2, None, (), "eager")
    given: dict[str, Any] = {
        "key": "model.losses.it",
        "unit": unit,
        "num_classes": num_classes,
        "class_counts": lambda: counts(num_classes),
        "class_name": lambda i: f"class{i}",
        "num_samples": int(counts(num_classes).sum()),
        "batch_size": 8,
        "micro_batch": 8,
        "packed": False,
        "student": student,
        "teacher": teacher,
    }
    return Setting(**(given | changes))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a linear layer of a given weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def gap(ours: Tensor, reference: Tensor) -> float:
    """Give the distance relative to the reference's norm (to 1e-7 where that is smaller)."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-7))


def assert_close(ours: Result, reference: Result, tolerance: float) -> None:
    """Compare value and both gradients."""
    for name in ("value", "features", "weight"):
        found = gap(getattr(ours, name), getattr(reference, name))
        assert found <= tolerance, f"{name}: relative difference {found:.2e}, allowed {tolerance:.0e}"
