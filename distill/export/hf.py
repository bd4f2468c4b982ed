"""Plain safetensors that stock transformers loads."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from distill.export.base import Format, Run, Source
from distill.export.served import logits_of
from distill.tasks import Task


class HuggingFace(Format):
    """`model.safetensors` and `config.json`, in float32 or bfloat16."""

    name = "hf"
    precisions: ClassVar[Mapping[str, float]] = {"fp32": 0.0, "bf16": 0.01}

    def write(self, source: Source, folder: Path) -> None:
        """Save, cast if asked."""
        model = source.model if self.precision == "fp32" else copy.deepcopy(source.model).to(torch.bfloat16)
        model.save_pretrained(folder)

    def load(self, folder: Path, task: Task) -> Run:
        """Load with transformers."""
        model = task.load(str(folder), "export", dtype="auto").eval()
        return lambda batch: logits_of(model, batch)
