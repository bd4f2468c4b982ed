"""A model without weights, for those who match layers or count rows where the teacher itself is elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from distill.tasks import Task, unwrap


def config_values(model: nn.Module) -> dict[str, Any]:
    """Give a model's configuration as JSON knows it, every value written out."""
    values: dict[str, Any] = json.loads(unwrap(model).config.to_json_string(use_diff=False))
    return values


def without_weights(task: Task, values: Mapping[str, Any]) -> Any:
    """Build the model of a configuration on the `meta` device, frozen.

    Args:
        task: how to build it.
        values: see `config_values`.
    """
    with TemporaryDirectory() as folder:  # transformers reads its own files best
        (Path(folder) / "config.json").write_text(json.dumps(dict(values)), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return task.build(config).requires_grad_(False).eval()
