"""From values back to integers, to the bit."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.compress import fake_quant, integers, schemes
from distill.compress.select import linears
from distill.types import DataError
from tests import models
from tests.compress.test_fake_quant import ALL, attached
from tests.export.sources import as_torchao

INTEGERS = [(name, group_size) for name, group_size in ALL if name != "fp8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group_size"), INTEGERS)
def test_integers_times_scales_is_the_weight_to_the_bit_and_again(name: str, group_size: Any, dtype: torch.dtype) -> None:
    how = schemes.scheme(name, group_size, "here")
    weight = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0], weight[1, 8:], weight[2] = 0, 0, weight[2].abs()  # nothing at all, one group, no negative numbers
    quantised = fake_quant.weight_quantiser(how)(weight)
    levels, scales = integers.integers(quantised, how)
    low, high = (-1, 1) if how.kind == "ternary" else (-(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1)
    assert levels.dtype == torch.int8
    assert low <= int(levels.min()) < 0 < int(levels.max()) <= high
    assert scales.shape == ((1, 1) if group_size is None and name == "ternary" else (400, 64 // how.group_size if how.group_size else 1))
    again = (levels.view(*scales.shape, -1) * scales[..., None]).view_as(weight)
    assert again.dtype == dtype
    assert torch.equal(again, quantised)
    for one, other in zip(integers.integers(again, how), (levels, scales), strict=True):
        assert torch.equal(one, other)


def test_values_off_the_grid_are_refused() -> None:
    how = schemes.scheme("int4", 8, "here")
    quantised = fake_quant.weight_quantiser(how)(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    quantised[1, 3] += 1e-4
    with pytest.raises(DataError, match=r"1 of 8 groups of a weight \[4, 16\] are not on a grid of 16 levels: the student was trained"):
        integers.integers(quantised, how)
    with pytest.raises(DataError, match="are not on a grid"):
        integers.integers(quantised.half().float(), how)


def finished(model: PreTrainedModel, name: str, how: schemes.Scheme) -> PreTrainedModel:
    layers = linears(model, None, None, "here")
    for layer in layers.values():
        fake_quant.detach(layer)
    integers.record(model, name, dict.fromkeys(layers, how))
    return model


@pytest.mark.parametrize(("name", "group_size"), INTEGERS)
def test_stock_transformers_and_torchao_give_the_logits(
    name: str, group_size: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how = schemes.scheme(name, group_size, "here")
    trained = attached(models.causal_lm(), how)
    expected = trained(models.tokens()).logits
    finished(trained, name, how).save_pretrained(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "UNEXPECTED" not in capfd.readouterr().err
    if not how.inputs:
        assert torch.equal(loaded(models.tokens()).logits, expected), "stock transformers"
    assert integers.recorded(loaded) == dict.fromkeys(linears(loaded, None, None, "here"), how)
    assert torch.equal(as_torchao(loaded)(models.tokens()).logits, expected), "torchao's integers"


def test_a_model_that_was_never_quantised_has_no_record() -> None:
    assert integers.recorded(models.causal_lm()) == {}
