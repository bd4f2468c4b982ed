"""Weights that are on a quantised grid already: their integers and scales, for formats that can store them as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.compress.integers import integers, recorded
from distill.compress.schemes import Scheme


@dataclass(frozen=True)
class Grid:
    """The weight of a linear layer as `levels · scales`.

    Attributes:
        levels: `[out, in]`, int8.
        scales: `[out, in / group_size]`, `[out, 1]`, or `[1, 1]`, float32.
        how: the scheme that made it.
    """

    levels: Tensor
    scales: Tensor
    how: Scheme

    def rows(self) -> Tensor | None:
        """The scale of each row, `[out]`; None where a row has several."""
        return self.scales.expand(self.levels.shape[0], -1).flatten() if self.scales.shape[1] == 1 else None

    def blocks(self, size: int) -> Tensor | None:
        """The scales of blocks of `size` weights in a row, `[out, in / size]`; None where a block would have several."""
        out, width = self.levels.shape
        per_scale = width // self.scales.shape[1]
        if width % size or per_scale % size:
            return None
        return self.scales.expand(out, -1).repeat_interleave(per_scale // size, 1)


def grids_of(model: PreTrainedModel) -> dict[str, Grid]:
    """Read the grids of a student that was quantised in training (or by `ptq`), by name of the layer; 8-bit floats have none.

    Args:
        model: in the dtype it was saved in: another rounds the products, and the integers cannot be read back.

    Raises:
        DataError: the config says that a layer is quantised, but its weights are not.
    """
    found = {}
    for name, how in recorded(model).items():
        if how.kind != "fp8":
            levels, scales = integers(model.get_submodule(name).weight.detach(), how)
            found[name] = Grid(levels, scales.to(torch.float32), how)
    return found
