"""Models without weights: built from their configuration on the `meta` device, which counts but holds nothing."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from distill import hub
from distill.layers import layers_of
from distill.plan.job import Shape
from distill.students.base import Student
from distill.tasks import Task, unwrap
from distill.types import ConfigError


def config_of(name: str, key: str, revision: str | None = None) -> Any:
    """Read the configuration of a model from a folder or the hub; no weights.

    Raises:
        ConfigError: it is not there, or the hub cannot be reached or refuses.
    """
    return hub.load(AutoConfig, name, key, revision=revision)


def build(
    task: Task, config: Any, attn_implementation: str | None, student: Student | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a model on the device in force, `meta` to count: a student as it would be trained, or (without one) a frozen teacher."""
    kwargs: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = task.build(config, dtype=dtype, **kwargs)
    if student is None:
        return model.requires_grad_(False).eval()
    return student.wrapped(model, task).train()


def shape_of(model: nn.Module, who: str) -> Shape:
    """Count a model.

    Args:
        model: of transformers, possibly wrapped by peft; on any device.
        who: key of the model, for messages.

    Raises:
        ConfigError: its layers are in no list.
    """
    inner, layers = unwrap(model), layers_of(model, who)
    if not layers.blocks:
        raise ConfigError(f"{who}: plan cannot find the layers of {type(inner).__name__}; use fit --dry-run instead")
    block = inner.get_submodule(layers.blocks[0])
    matrices = [p for name, p in block.named_parameters() if p.ndim == 2 and "lora_" not in name]
    widest = max(max(p.shape) for p in matrices)
    projections = dict(layers.projections)
    queries, *others = list(projections.values()) or [layers.width] * 3
    embedding, head = inner.get_input_embeddings().weight, inner.get_output_embeddings()
    params = list(model.parameters())
    return Shape(
        parameters=sum(p.numel() for p in params),
        trainable=sum(p.numel() for p in params if p.requires_grad),
        embedding=embedding.numel(),
        head=0 if head is None else head.weight.numel(),
        tied=head is not None and head.weight is embedding,
        head_trains=head is not None and head.weight.requires_grad,
        layer=max(sum(p.numel() for p in inner.get_submodule(name).parameters()) for name in layers.blocks),
        layers=layers.count,
        width=layers.width,
        queries=queries,
        keys=sum(others),
        heads=layers.heads,
        inner=widest,
        gated=sum(max(p.shape) == widest for p in matrices) > 2,
        maps=layers.implementation == "eager",
    )


def on_meta(task: Task, config: Any, attn_implementation: str | None, student: Student | None = None) -> nn.Module:
    """Build without memory; peft needs its adapters there too."""
    with torch.device("meta"):
        return build(task, config, attn_implementation, student)
