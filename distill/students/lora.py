"""LoRA students: low-rank updates of a frozen base (Hu et al. 2021, arXiv 2106.09685), through peft."""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from distill.students.base import Batches, Student
from distill.students.load import FromConfig
from distill.tasks import SequenceClassification, Task
from distill.types import ConfigError


class LoRA(Student):
    """Train `W + (alpha / r) B A` with W frozen, A `[r, in]` and B `[out, r]`.

    Args:
        base: the student to wrap, one with weights.
        r: the rank.
        alpha: the scale, divided by r.
        dropout: on the input of A.
        target_modules: names of the linears to update, or `all-linear` (all but the head).

    Raises:
        ConfigError: the rank is below 1, the base is new, or (when it is built) the model has no such modules.
    """

    def __init__(
        self, base: Student, r: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: str | list[str] = "all-linear"
    ) -> None:
        if r < 1:
            raise ConfigError(f"model.student.r must be at least 1, got {r}; it is the rank of the update")
        if isinstance(base, FromConfig):
            raise ConfigError("model.student.base is FromConfig, but LoRA trains an update of a base with weights; take Pretrained")
        self.base, self.r, self.alpha, self.dropout, self.target_modules = base, r, alpha, dropout, target_modules
        self.attn_implementation, self.gradient_checkpointing = base.attn_implementation, base.gradient_checkpointing
        self.name = f"{base.name} + LoRA r={r}"

    def calibrate_on(self, batches: Batches) -> None:
        """Hand them on to the base."""
        self.base.calibrate_on(batches)

    def build(self, task: Task, expected: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Build the base, then wrap it; a classifier's new head stays trainable."""
        return self.wrapped(self.base.build(task, expected, tokenizer, dtype), task)

    def blueprint(self, task: Task, expected: dict[str, Any]) -> Any:
        """The base's."""
        return self.base.blueprint(task, expected)

    def wrapped(self, model: PreTrainedModel, task: Task) -> PreTrainedModel:
        """Add A and B."""
        kind = TaskType.SEQ_CLS if isinstance(task, SequenceClassification) else TaskType.CAUSAL_LM
        # a classifier's head is trained whole, and peft finds it by the end of its name: what is called so must not get an update as well
        head = [name for name, _ in model.named_modules() if name == "pre_classifier" and kind == TaskType.SEQ_CLS] or None
        given: dict[str, Any] = {"target_modules": self.target_modules, "exclude_modules": head, "task_type": kind}
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, **given)
        try:
            return get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.student.target_modules: {' '.join(str(error).split())}") from error


def merged(model: nn.Module) -> PreTrainedModel:
    """Give a model that plain transformers can load: `W + (alpha / r) B A` in place of W, in a copy; a model without LoRA as it is."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    assert isinstance(model, PreTrainedModel)
    return model
