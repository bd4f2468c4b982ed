"""Students from a folder or hub id, and new ones from a configuration."""

import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from distill import hub
from distill.checks import check_classes, check_head, check_order, set_padding
from distill.lookup import did_you_mean
from distill.students.base import Student
from distill.tasks import SequenceClassification, Task
from distill.types import ConfigError


class Pretrained(Student):
    """A model with weights, from a folder or the hub.

    Args:
        model: a folder or a hub id.
        revision: of the hub id.
        attn_implementation: as in transformers, e.g. `sdpa`, `flash_attention_2`.
        gradient_checkpointing: keep only the inputs of each layer and compute the rest again in the backward pass.
    """

    def __init__(
        self, model: str, revision: str | None = None, attn_implementation: str | None = None, gradient_checkpointing: bool = False
    ) -> None:
        self.name, self.revision = model, revision
        self.attn_implementation, self.gradient_checkpointing = attn_implementation, gradient_checkpointing

    def build(self, task: Task, expected: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Load; a classifier gets a new head where the checkpoint has none for these labels."""
        kwargs: dict[str, Any] = {"dtype": dtype, "revision": self.revision}
        if self.attn_implementation:
            kwargs["attn_implementation"] = self.attn_implementation
        if isinstance(task, SequenceClassification):
            config = hub.load(AutoConfig, self.name, "model.student.model", revision=self.revision)
            check_order(config, expected, "model.student", only_same_names=True)
            labels = {k: expected[k] for k in ("num_labels", "id2label", "label2id")}
            kwargs |= {**labels, "ignore_mismatched_sizes": True}
        hub.check_tokenizer(self.name, "model.student.model", self.revision, tokenizer)
        model = task.load(self.name, "model.student.model", **kwargs)
        check_classes(model, expected, "model.student")
        set_padding(model, expected)
        return _ready(task, model, self.gradient_checkpointing)

    def blueprint(self, task: Task, expected: dict[str, Any]) -> Any:
        """Read the configuration."""
        return hub.load(AutoConfig, self.name, "model.student.model", revision=self.revision)


class FromConfig(Student):
    """A randomly initialised model.

    Args:
        config: keys of the transformers config, with `model_type` (e.g. `llama`); or the folder or hub id of one. What the data
            decide (`vocab_size`, `num_labels`, ids of special tokens) is filled in.
        attn_implementation: as in `Pretrained`.
        gradient_checkpointing: as in `Pretrained`.
    """

    def __init__(self, config: dict[str, Any] | str, attn_implementation: str | None = None, gradient_checkpointing: bool = False) -> None:
        self.config, self.attn_implementation, self.gradient_checkpointing = config, attn_implementation, gradient_checkpointing
        self.name = config if isinstance(config, str) else f"new {config.get('model_type', 'model')}"

    def blueprint(self, task: Task, expected: dict[str, Any]) -> Any:
        """Fill in what the data decide."""
        if isinstance(self.config, str):
            return hub.load(AutoConfig, self.config, "model.student.config", **expected)
        given = dict(self.config)
        return for_model(given.pop("model_type", None), given, expected)

    def build(self, task: Task, expected: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Fill in what the data decide, and initialise."""
        given = self.config if isinstance(self.config, dict) else {}
        for key in set(given) & set(expected):
            if given[key] != expected[key]:
                raise ConfigError(f"model.student.config.{key} is {given[key]}, but the data say {expected[key]}; leave the key out")
        config = self.blueprint(task, expected)
        kwargs: dict[str, Any] = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        return _ready(task, task.build(config, dtype=dtype, **kwargs), self.gradient_checkpointing)


def _known_keys(model_type: str) -> set[str]:
    config = AutoConfig.for_model(model_type)
    return (
        set(config.to_dict()) | set(inspect.signature(type(config)).parameters) | set(config.attribute_map) | {"rope_theta", "rope_scaling"}
    )


def for_model(model_type: str | None, given: dict[str, Any], expected: dict[str, Any]) -> Any:
    """Make the transformers config of a `model_type` from the keys that are given and those that the data decide.

    Raises:
        ConfigError: no such type or key, or values that it refuses.
    """
    if not model_type:
        raise ConfigError("model.student.config has no model_type; say e.g. model_type: llama")
    try:
        known = _known_keys(model_type)
        for key in given:
            if key not in known:
                raise ConfigError(f"model.student.config: {model_type} has no key '{key}'{did_you_mean(key, sorted(known))}")
        return AutoConfig.for_model(model_type, **given | expected)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.student.config: {' '.join(str(error).split())[:300]}") from error


def _ready(task: Task, model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    if _runs_here(model):
        check_head(task, model, "model.student")
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _runs_here(model: PreTrainedModel) -> bool:
    """Whether a forward pass is possible before the trainer has moved the model: flash kernels want a GPU and half precision."""
    flash = "flash" in (model.config._attn_implementation or "")
    return not flash or (model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16))
