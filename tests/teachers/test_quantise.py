import sys
from pathlib import Path

import pytest
import torch

from distill import hub
from distill.parallel.same import fingerprint
from distill.tasks import CausalLM
from distill.teachers.online import OnlineTeacher
from distill.teachers.quantise import quantise
from distill.types import ConfigError
from tests.models import causal_lm, save, tokens

pytest.importorskip("torchao", reason="torchao is an extra")


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


def test_a_quantised_teacher_is_smaller_and_close(tmp_path: Path) -> None:
    folder = save(causal_lm(hidden_size=64, intermediate_size=128, head_dim=32), tmp_path)
    plain, small = OnlineTeacher(folder), OnlineTeacher(folder, quantize="int8")
    for teacher in (plain, small):
        teacher.setup(CausalLM(), torch.device("cpu"), torch.float32)
        teacher.assert_frozen()
    expected, got = (teacher.task.outputs(teacher.model, {"input_ids": tokens()}).features for teacher in (plain, small))
    assert 0 < (got - expected).norm() / expected.norm() < 0.1
    assert small.describe()["parameters"] == plain.describe()["parameters"]
    linears = sum(m.weight.numel() for n, m in plain.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    assert small.describe()["megabytes"] < plain.describe()["megabytes"] - 2.5 * linears / 1e6


def test_other_weights_have_another_fingerprint_when_quantised() -> None:
    prints = []
    for seed in (0, 0, 1):
        model = causal_lm(seed=seed).requires_grad_(False)
        quantise(model)
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
