"""Plain safetensors that stock transformers loads."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from distill.compress.integers import forget, recorded
from distill.export.base import Format, Run, Source
from distill.export.grid import grids_of
from distill.report.costs.served import logits_of
from distill.tasks import Task
from distill.types import DataError


class HuggingFace(Format):
    """`model.safetensors` and `config.json`, in float32 or bfloat16.

    Of a student that training quantised, the record of it in `config.json` stays where every layer is on its grid after the cast too: the
    record of one that was trained in bfloat16 is true in bfloat16 alone.
    """

    name = "hf"
    precisions: ClassVar[Mapping[str, float]] = {"fp32": 0.0, "bf16": 0.01}

    def write(self, source: Source, folder: Path) -> None:
        """Save, cast if asked."""
        model = source.model if self.precision == "fp32" else copy.deepcopy(source.model).to(torch.bfloat16)
        if recorded(model) and not _still_on_grid(model, source):
            model = copy.copy(model)
            model.config = copy.deepcopy(model.config)
            forget(model)
        model.save_pretrained(folder)

    def load(self, folder: Path, task: Task) -> Run:
        """Load with transformers."""
        model = task.load(str(folder), "export", dtype="auto").eval()
        # transformers leaves weights at the odd addresses that they have in the mapped file, where a CPU's sums may differ in the last bit
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return lambda batch: logits_of(model, batch)


def _still_on_grid(model: PreTrainedModel, source: Source) -> bool:
    """Whether every layer that was quantised has the same integers as before; 8-bit floats, which have none, the same values."""
    floats = [name for name, how in recorded(model).items() if how.kind == "fp8"]
    if any(not torch.equal(model.get_submodule(name).weight.float(), source.model.get_submodule(name).weight) for name in floats):
        return False
    try:
        found = grids_of(model)
    except DataError:  # the products were rounded to values that are none
        return False
    return all(torch.equal(grid.levels, source.grids[name].levels) for name, grid in found.items())
