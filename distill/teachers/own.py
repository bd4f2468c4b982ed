"""The student as it was before training, as its own teacher: a LoRA student without its adapters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.types import Batch, ConfigError, Outputs


class SelfTeacher(Teacher):
    """The base of a LoRA student: the same weights in memory, run without the adapters. It costs a forward pass, and no memory.

    For a student that is to learn something else and not drift from what it was. A classifier's head must come with the checkpoint: a new
    one knows nothing.
    """

    name = "the student without its adapters"

    def __init__(self) -> None:
        self.student: PeftModel | None = None

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the task."""
        self.task = task

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Nothing: tokenizer and classes are the student's."""

    def beside(self, student: nn.Module) -> None:
        """Take the student.

        Raises:
            ConfigError: it has no adapters, or some on its head, or what is under them is trained, too.
        """
        if not isinstance(student, PeftModel) or student.peft_config[student.active_adapter].is_prompt_learning:
            raise ConfigError(
                "model.teacher: SelfTeacher is the student without its adapters, but model.student has none; take LoRA, or an OnlineTeacher"
            )
        self.student = student
        if any(isinstance(module, BaseTunerLayer) for module in self.task.head(student).modules()):  # it is applied later, adapters on
            raise ConfigError(
                "model.teacher: SelfTeacher needs a head without adapters; leave the head out of model.student.target_modules"
            )
        if moving := self._moving():
            raise ConfigError(
                f"model.teacher: SelfTeacher is the student without its adapters, but training changes {', '.join(moving[:3])} there, too; "
                "train the adapters alone"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the base in evaluation mode."""
        assert self.student is not None, "beside comes first"
        with _without_adapters(self.student):
            return self.task.outputs(self.student, batch, taps)

    def structure(self) -> nn.Module | None:
        """The student, whose layers are the teacher's."""
        return self.student

    def assert_frozen(self) -> None:
        """Stop where the base has become trainable."""
        assert not self._moving(), "the student's base has trainable parameters"

    def describe(self) -> dict[str, Any]:
        """Nothing beside the student."""
        return {"parameters": 0, "trainable": 0, "megabytes": 0.0, "dtype": "the student's"}

    def _moving(self) -> list[str]:
        assert self.student is not None, "beside comes first"
        with _without_adapters(self.student):
            return [name for name, parameter in self.student.named_parameters() if parameter.requires_grad]


@contextmanager
def _without_adapters(model: PeftModel) -> Iterator[None]:
    """Run a model as its base, evaluating, while the context is open; every flag is then as it was."""
    training = [module for module in model.modules() if module.training]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in training:
        module.training = False
    try:
        with model.disable_adapter():  # which freezes the adapters, and afterwards makes all of them trainable
            yield
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        for module in training:
            module.training = True
