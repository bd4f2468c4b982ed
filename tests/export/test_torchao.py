"""torchao's integers load in stock transformers, and are those that training chose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.compress.ptq import ptq
from distill.export.driver import export, parse
from distill.export.grid import grids_of
from distill.types import ConfigError
from tests.export.sources import bert, llama, low_rank, mixed, source

pytest.importorskip("torchao", reason="the format needs torchao")


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {
        name: layer.weight.dequantize()
        for name, layer in model.named_modules()
        if hasattr(getattr(layer, "weight", None), "dequantize") and type(layer.weight.data) is not torch.Tensor
    }


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int8-dynamic", 255), ("int4", 15)])
def test_a_float_student_is_quantised_and_loads_again(tmp_path: Path, precision: str, levels: int) -> None:
    done = export(source(llama()), parse([f"torchao:{precision}", f"packed:{precision}"], None), tmp_path)
    assert 0 < done[0].gap.kl < 0.02
    assert done[0].gap == done[1].gap
    assert (done[1].bytes or 0) < (done[0].bytes or 0)
    originals = dict(llama().named_parameters())
    stored = dequantised(tmp_path / f"torchao-{precision}")
    assert len(stored) == 14, "seven a layer, and not the head"
    for name, weight in stored.items():
        original = originals[f"{name}.weight"]
        # half a step of a symmetric grid, of the largest group, and a little for the clipped end
        assert (weight - original).abs().max() <= original.abs().max() / levels * 1.02
        assert not torch.equal(weight, original)


def test_an_encoder_too(tmp_path: Path) -> None:
    done = export(source(bert()), parse(["torchao"], None), tmp_path)
    assert 0 < done[0].gap.kl < 1e-3


@pytest.mark.parametrize(("scheme", "precision"), [("int8", "int8"), ("int4", "int4"), ("int3", "int4"), ("ternary", "int8")])
def test_what_was_quantised_before_keeps_its_values_to_the_bit(tmp_path: Path, scheme: str, precision: str) -> None:
    quantised = ptq(llama(), scheme)
    export(source(quantised), parse(["torchao"], precision), tmp_path)
    stored = dequantised(tmp_path / f"torchao-{precision}")
    assert len(stored) == 14
    assert all(torch.equal(weight, quantised.get_submodule(name).weight) for name, weight in stored.items())  # type: ignore[arg-type]


def test_mixed_bits_keep_their_values_and_finer_ones_are_rounded_where_they_must(tmp_path: Path) -> None:
    given = mixed()
    export(given, parse(["torchao:int4"], None), tmp_path)
    stored = dequantised(tmp_path / "torchao-int4")
    same = {name for name, weight in stored.items() if torch.equal(weight, given.model.get_submodule(name).weight)}  # type: ignore[arg-type]
    assert not any("self_attn" in name for name in same), "eight bits do not fit into four"
    assert {name for name in stored if "mlp" in name} <= same, "what fits is not rounded a second time"


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.down_proj' has 72 inputs; take int8"):
        export(source(llama(intermediate_size=72)), parse(["torchao:int4"], None), tmp_path)


@pytest.mark.parametrize(("scheme", "precision"), [("int8", "int8"), ("int4", "int4"), ("ternary", "int8")])
def test_a_student_saved_in_half_precision_keeps_its_integers_and_scales(tmp_path: Path, scheme: str, precision: str) -> None:
    saved = ptq(llama().to(torch.bfloat16), scheme)  # type: ignore[arg-type]
    grids = grids_of(saved)  # as the verb does: read in the dtype it was saved in, exported in float32
    export(source(saved.float(), grids), parse(["torchao"], precision), tmp_path)
    stored = dequantised(tmp_path / f"torchao-{precision}")
    assert len(stored) == 14
    for name, weight in stored.items():
        scales = grids[name].scales.expand(len(weight), -1)
        expected = grids[name].levels.view(len(weight), scales.shape[1], -1) * scales[..., None]
        assert torch.equal(weight, expected.view_as(weight))


@pytest.mark.parametrize("name", ["torchao", "packed:int8"])
def test_layers_of_two_factors_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"torchao cannot store .* '.*up_proj'; take hf, packed, onnx or openvino"):
        export(source(low_rank()), parse([name], None), tmp_path)
    assert not list(tmp_path.iterdir())
