"""From the quantised values of a saved student to its integers and scales, for exports."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.compress.schemes import Scheme
from distill.types import DataError

RECORD = "distill_quantization"  # key of the model's config.json


def record(model: PreTrainedModel, name: str, schemes: Mapping[str, Scheme]) -> None:
    """Say in the model's config what its weights are quantised to; `save_pretrained` writes it, and transformers passes over it.

    Of layers that were recorded before, by another compression of the same model, the record stays.
    """
    before: dict[str, Any] = getattr(model.config, RECORD, None) or {"scheme": "", "layers": {}}
    names = dict.fromkeys([*filter(None, before["scheme"].split(" + ")), name])
    layers = before["layers"] | {layer: asdict(how) for layer, how in schemes.items()}
    setattr(model.config, RECORD, {"scheme": " + ".join(names), "layers": layers})


def forget(model: PreTrainedModel, inside: str = "") -> None:
    """Drop the record of the layers whose names begin so, by default of all: their weights are going to be others."""
    found: dict[str, Any] | None = getattr(model.config, RECORD, None)
    if found is None:
        return
    if left := {layer: how for layer, how in found["layers"].items() if not layer.startswith(inside)}:
        setattr(model.config, RECORD, found | {"layers": left})
    else:
        delattr(model.config, RECORD)


def recorded(model: PreTrainedModel) -> dict[str, Scheme]:
    """How the layers of a saved student are quantised, by name; empty where none is."""
    found: dict[str, Any] = getattr(model.config, RECORD, None) or {"layers": {}}
    return {layer: Scheme(**how) for layer, how in found["layers"].items()}


@torch.no_grad()
def integers(weight: Tensor, how: Scheme) -> tuple[Tensor, Tensor]:
    """Read integers and scales back from quantised values, so that `integers · scales` is the weight to the bit.

    No scale need be stored: the largest weight of a group is `s · (2^(b−1) − 1)` or `s · 2^(b−1)` (in half precision one less, too), which
    leaves a few numbers for s, and the first that gives every weight of the group to the bit is taken.

    Args:
        weight: `[out, in]`, of a student that `QuantizationAwareTraining` has left, in the dtype it was saved in.
        how: its scheme; not fp8.

    Returns:
        `[out, in]` int8 in −2^(b−1) … 2^(b−1) − 1, and `[out, in / group_size]` of the weight's dtype (`[1, 1]` where one scale is all).

    Raises:
        DataError: the values are not of such integers, e.g. because they were trained or cast since.
    """
    assert how.kind != "fp8", "8-bit floats are no integers"
    rows = 1 if how.kind == "ternary" and how.group_size is None else weight.shape[0]
    # in float64, where products of levels and scales are exact until they are rounded to the weight's dtype
    blocks = weight.reshape(rows, -1, how.group_size or weight.numel() // rows).double()
    low, high = (-1, 1) if how.kind == "ternary" else (-(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1)
    peak = blocks.abs().amax(-1, keepdim=True)
    scales, found = torch.ones_like(peak, dtype=weight.dtype), peak == 0
    for top in dict.fromkeys((high, -low, max(1, high - 1))):
        for neighbour in (0, 1, -1):  # in the last place, for `s · top` was rounded
            tried = _moved((peak / top).to(weight.dtype), neighbour)
            levels = (blocks / tried).round()
            same = (levels * tried).to(weight.dtype) == blocks
            fits = (same & (levels >= low) & (levels <= high)).all(-1, keepdim=True) & ~found
            scales, found = torch.where(fits, tried, scales), found | fits
    if not found.all():
        raise DataError(
            f"{int((~found).sum())} of {found.numel()} groups of a weight {list(weight.shape)} are not on a grid of {high - low + 1} "
            "levels: the student was trained or cast after it was quantised; quantise it anew"
        )
    return (blocks / scales).round().to(torch.int8).view_as(weight), scales.squeeze(-1)


def on_grid(weight: Tensor, how: Scheme) -> bool:
    """Whether `integers` can be read back from a weight."""
    if how.group_size is not None and weight.shape[1] % how.group_size:
        return False
    try:
        integers(weight, how)
    except DataError:
        return False
    return True


def _moved(values: Tensor, places: int) -> Tensor:
    """The neighbours of positive floats, so many places on; `nextafter` knows no float16."""
    return (values.view(torch.int32 if values.element_size() == 4 else torch.int16) + places).view(values.dtype)
