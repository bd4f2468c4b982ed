"""What every teacher gets from its base class."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.types import Batch, Outputs


class Two(Teacher):
    """Holds two models."""

    name = "two"

    def __init__(self) -> None:
        self.both: list[nn.Module] = [nn.Linear(2, 2).requires_grad_(False).eval() for _ in range(2)]

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None: ...

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None: ...

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        return Outputs(torch.zeros(1, 1, 2), nn.Identity())

    def describe(self) -> dict[str, Any]:
        return {}

    def models(self) -> list[nn.Module]:
        return self.both


def test_every_model_must_be_frozen() -> None:
    teacher = Two()
    teacher.assert_frozen()
    teacher.both[1].train()
    with pytest.raises(AssertionError, match="training mode"):
        teacher.assert_frozen()
    teacher.both[1].eval().requires_grad_(True)
    with pytest.raises(AssertionError, match="trainable parameters"):
        teacher.assert_frozen()


def test_a_teacher_is_no_module_and_needs_no_recipe() -> None:
    assert not isinstance(Two(), nn.Module)
    assert Two().recipe_needed() is None
