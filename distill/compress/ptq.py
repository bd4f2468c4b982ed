"""Post-training quantisation: the baseline that quantisation-aware training stands beside."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from distill.compress import schemes
from distill.compress.fake_quant import weight_quantiser
from distill.compress.integers import record
from distill.compress.select import linears

KEY = "ptq"


@torch.no_grad()
def ptq(
    model: PreTrainedModel,
    scheme: str,
    group_size: int | Literal["row"] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Round the weights of linear layers to a scheme's grid, without any training: `w' = q(w)`, see `fake_quant` and `ternary`.

    The same grid that `QuantizationAwareTraining` leaves, recorded in the same way, so that every export treats both alike. Inputs stay
    as they are: the export quantises them.

    Args:
        model: a float student; left as it is.
        scheme: of `schemes.SCHEMES`, e.g. `int8`, `int4`, `ternary`.
        group_size: weights that share a scale; `row` for a scale a row, None for the scheme's own.
        include: patterns of layer names, see `select.linears`; None for all but the head.
        exclude: patterns of those that are left out.

    Returns:
        A copy; its weights are the quantised values, as floats.

    Raises:
        ConfigError: no such scheme or layer, or groups that do not fill a layer's rows.
    """
    how = schemes.scheme(scheme, group_size, KEY)
    quantised = copy.deepcopy(model)
    layers = linears(quantised, include, exclude, KEY)
    found = dict.fromkeys(layers, how)
    schemes.check_groups(layers, found, KEY)
    schemes.check_machine(found, KEY)
    quantise = weight_quantiser(how, KEY)
    for layer in layers.values():
        layer.weight.copy_(quantise(layer.weight))
    record(quantised, scheme, found)
    return quantised
