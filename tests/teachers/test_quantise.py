import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import hub
from distill.parallel.same import fingerprint
from distill.tasks import CausalLM
from distill.teachers.online import OnlineTeacher
from distill.teachers.quantise import quantise
from distill.types import ConfigError
from tests.models import causal_lm, classifier, save, tokens

pytest.importorskip("torchao", reason="torchao is an extra")
from distill.teachers.int4.packed import PackedInt4


def test_weights_are_rounded_to_8_bits_by_row_and_the_head_is_left() -> None:
    model = causal_lm().requires_grad_(False)
    plain = {name: p.clone() for name, p in model.named_parameters()}
    quantise(model)
    for name, weight in model.named_parameters():
        if "_proj." in name:
            original = plain[name].double()
            step = original.abs().amax(1, keepdim=True) / 127.5
            integers = weight.dequantize().double() / step
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
            assert -128 <= integers.round().min() <= integers.round().max() <= 127
            assert (integers - original / step).abs().max() <= 0.5 + 1e-3  # the nearest one
        else:
            assert torch.equal(weight, plain[name])


def test_weights_are_rounded_to_4_bits_by_groups_of_32_columns() -> None:
    model = causal_lm(hidden_size=64, intermediate_size=96, head_dim=32).requires_grad_(False)
    plain = {name: p.clone() for name, p in model.named_parameters()}
    quantise(model, "int4")
    for name, weight in model.named_parameters():
        if "_proj." in name:
            groups = plain[name].double().unflatten(1, (-1, 32))
            step = groups.abs().amax(-1, keepdim=True) / 7.5
            integers = weight.dequantize().double().unflatten(1, (-1, 32)) / step
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
            assert -8 <= integers.round().min() <= integers.round().max() <= 7
            assert (integers - (groups / step).clamp(max=7)).abs().max() <= 0.5 + 1e-4  # the nearest one
            assert weight.shape == plain[name].shape
            assert sum(part.numel() * part.element_size() for part in hub.stored(weight.data)) == weight.numel() * (0.5 + 4 / 32)
        else:
            assert torch.equal(weight, plain[name])


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_classifiers_head_is_left_too(to: Any) -> None:
    model = classifier(hidden_size=32).requires_grad_(False)
    quantise(model, to)
    assert type(model.classifier.weight.data) is torch.Tensor
    assert type(model.bert.encoder.layer[0].attention.self.query.weight.data) is not torch.Tensor


def test_linears_that_are_no_groups_wide_stay() -> None:
    model = causal_lm(hidden_size=64, intermediate_size=72, head_dim=32).requires_grad_(False)
    quantise(model, "int4")
    layer = model.model.layers[0].mlp
    assert (len(hub.stored(layer.down_proj.weight.data)), len(hub.stored(layer.up_proj.weight.data))) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_4_bits_are_those_of_the_rounded_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8, dtype=dtype).requires_grad_(False)
    x, bias = torch.randn(2, 3, 64, dtype=dtype), linear.bias
    linear.weight = torch.nn.Parameter(PackedInt4.of(linear.weight), requires_grad=False)
    atol = 1e-5 if dtype == torch.float32 else 2e-2  # a product and a sum, or both at once, round differently
    torch.testing.assert_close(linear(x), x @ linear.weight.dequantize().T + bias, rtol=1e-4, atol=atol)
    assert linear.weight.dtype == dtype


@pytest.mark.parametrize(("quantize", "error", "saved"), [("int8", 0.1, 2.5), ("int4", 0.6, 3.3)])
def test_a_quantised_teacher_is_smaller_and_close(quantize: Any, error: float, saved: float, tmp_path: Path) -> None:
    folder = save(causal_lm(hidden_size=64, intermediate_size=128, head_dim=32), tmp_path)
    plain, small = OnlineTeacher(folder), OnlineTeacher(folder, quantize=quantize)
    for teacher in (plain, small):
        teacher.setup(CausalLM(), torch.device("cpu"), torch.float32)
        teacher.assert_frozen()
    expected, got = (teacher.task.outputs(teacher.model, {"input_ids": tokens()}).features for teacher in (plain, small))
    assert 0 < (got - expected).norm() / expected.norm() < error
    assert small.describe()["parameters"] == plain.describe()["parameters"]
    linears = sum(m.weight.numel() for n, m in plain.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    assert small.describe()["megabytes"] < plain.describe()["megabytes"] - saved * linears / 1e6


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_other_weights_have_another_fingerprint_when_quantised(quantize: Any) -> None:
    prints = []
    for seed in (0, 0, 1):
        model = causal_lm(seed=seed, hidden_size=32, head_dim=16).requires_grad_(False)
        quantise(model, quantize)
        prints.append(fingerprint(model))
    assert torch.equal(prints[0], prints[1])
    assert not torch.equal(prints[0], prints[2])


def test_plain_tensors_are_stored_as_themselves() -> None:
    weight = torch.zeros(2)
    assert hub.stored(weight)[0] is weight


def test_without_torchao_the_cause_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match="needs torchao, which is not installed"):
        quantise(causal_lm())
