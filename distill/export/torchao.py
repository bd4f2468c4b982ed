"""Weights as torchao's integers, in safetensors that transformers loads."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from distill.compress.select import linears
from distill.export.base import Format, Run, Source, need, refuse_factors
from distill.export.grid import Grid
from distill.report.costs.served import logits_of
from distill.tasks import Task
from distill.types import ConfigError

GROUP = 32
BITS = {"int8": 8, "int8-dynamic": 8, "int4": 4}


class TorchAO(Format):
    """Linear layers but the head as integers: `int8` and `int4` weights, or `int8-dynamic` with int8 inputs too.

    What training quantised keeps its integers and scales where they fit, what it left in floats stays so, and what it left finer is
    rounded. Of `int4` each weight takes a byte all the same, which is all that torchao 0.18 can both run on a CPU and write as safetensors:
    `packed:int4` gets the other half back on the disk.
    """

    name = "torchao"
    precisions: ClassVar[Mapping[str, float]] = {"int8": 0.05, "int8-dynamic": 0.1, "int4": 0.5}

    def check(self, source: Source) -> None:
        """Look for torchao, and for layers that it can store."""
        need("torchao", self.name)
        refuse_factors(source, self.name)
        for name, layer in self._anew(source).items():
            if self.precision == "int4" and layer.in_features % GROUP:
                raise ConfigError(
                    f"format: {self.name} int4 has groups of {GROUP} weights, and '{name}' has {layer.in_features} inputs; take int8"
                )

    def write(self, source: Source, folder: Path) -> None:
        """Quantise a copy, and save it."""
        from torchao.quantization import quantize_

        model: Any = copy.deepcopy(source.model)
        base, anew = self._base(), self._anew(source)
        for name, grid in source.learned(BITS[self.precision]).items():
            carry(model.get_submodule(name), grid)
        quantize_(model, base, filter_fn=lambda _, name: name in anew)
        _declare(model, base)
        model.save_pretrained(folder)

    def _anew(self, source: Source) -> dict[str, nn.Linear]:
        """The layers whose integers are chosen here: all, or where training has chosen some that fit, those that it has left finer."""
        layers = linears(source.model, None, None, f"format: {self.name}")
        learned = source.learned(BITS[self.precision])
        finer = source.grids.keys() - learned.keys()
        return {name: layer for name, layer in layers.items() if name in finer} if learned else layers

    def load(self, folder: Path, task: Task) -> Run:
        """Load with transformers."""
        model = task.load(str(folder), "export", dtype="auto").eval()
        return lambda batch: logits_of(model, batch)

    def _base(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        made: dict[str, Any] = {
            "int8": lambda: Int8WeightOnlyConfig(version=2),
            "int8-dynamic": Int8DynamicActivationInt8WeightConfig,
            "int4": lambda: IntxWeightOnlyConfig(getattr(torch, f"int{BITS['int4']}"), PerGroup(GROUP)),
        }
        return made[self.precision]()


def carry(layer: Any, grid: Grid) -> None:
    """Store a layer's weight as torchao's tensor of the integers and scales that it has already, in place.

    They are not read from the weight: in another dtype than the student was saved in, its values are no products any more. Nor is it
    `quantize_` with a base config, which would choose scales anew, for which quantised values are no fixed point.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block = tuple(size // parts for size, parts in zip(grid.levels.shape, grid.scales.shape, strict=True))
    dtype, inputs = getattr(torch, f"int{grid.how.bits}"), "int8_asym_per_token" if grid.how.inputs else None
    scales = grid.scales.to(layer.weight.dtype)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    stored = IntxUnpackedToInt8Tensor(grid.levels, scales, zeros, dtype, block, layer.weight.dtype, inputs)
    layer.weight = nn.Parameter(stored, requires_grad=False)


def _declare(model: Any, base: Any) -> None:
    """Say in the config how the weights are stored; what `from_pretrained(quantization_config=…)` would have left on the model."""
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    quantised = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor
    ]
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantised]
    model.config.quantization_config = TorchAoConfig(base, modules_to_not_convert=others or None)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
