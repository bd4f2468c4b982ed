"""Fake quantisation: torchao's to the bit, its gradient by hand, and in company of masks."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from distill.compress import fake_quant, schemes
from distill.compress.select import linears
from tests import models

GROUPS: list[tuple[str, Any]] = [("int8", None), ("int8-int4", 8), ("int4", 8), ("int4", "row"), ("int3", 8), ("int2", 8)]
ALL: list[tuple[str, Any]] = [*GROUPS, ("ternary", None), ("ternary", 8), ("fp8", None)]


def base_config(how: schemes.Scheme) -> Any:
    """Torchao's own config of the same scheme."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    granularity = PerAxis(0) if how.group_size is None else PerGroup(how.group_size)
    config = Int8DynamicActivationIntxWeightConfig if how.inputs else IntxWeightOnlyConfig
    return config(getattr(torch, f"int{how.bits}"), granularity)


def by_torchao(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    from torchao.quantization import quantize_

    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head)
    return model


def attached(model: PreTrainedModel, how: schemes.Scheme) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for layer in linears(model, None, None, "here").values():
        fake_quant.attach(layer, how)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "group_size"), GROUPS)
def test_logits_and_gradients_are_those_of_torchao(name: str, group_size: Any, dtype: torch.dtype) -> None:
    from torchao.quantization.qat import QATConfig

    how = schemes.scheme(name, group_size, "here")
    model = models.causal_lm().train().to(dtype)
    ours, theirs = attached(model, how), by_torchao(model, QATConfig(base_config(how), step="prepare"))
    logits, expected = (each(models.tokens()).logits for each in (ours, theirs))
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, model(models.tokens()).logits)
    assert torch.equal(ours.eval()(models.tokens()).logits, by_torchao(model.eval(), base_config(how))(models.tokens()).logits), (
        "real integers"
    )
    for each in (logits, expected):
        each.float().square().sum().backward()
    gradients = {n.replace("parametrizations.weight.original", "weight"): p.grad for n, p in ours.named_parameters()}
    assert all(torch.equal(gradients[n], p.grad) for n, p in theirs.named_parameters())  # type: ignore[arg-type]


def reference(weight: Tensor, bits: int, size: int) -> Callable[[Tensor], Tensor]:
    """By hand, one weight at a time: 1 where the level is inside the range, 0 where it was clipped; the gradient in float64.

    Levels are found in float32: the largest weight of a group lies on a tie, which decides whether it is clipped.
    """
    low, high, c = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (2**bits - 1) / 2

    def gradient(flow: Tensor) -> Tensor:
        found = torch.zeros_like(weight, dtype=torch.float64)
        for row in range(weight.shape[0]):
            for start in range(0, weight.shape[1], size):
                group = weight[row, start : start + size].numpy()
                s = np.float32(np.abs(group).max() / np.float32(c))
                for i, w in enumerate(group):
                    inside = low <= np.round(w * (np.float32(1) / s)) <= high
                    found[row, start + i] = flow[row, start + i].double() * float(inside)
        return found

    return gradient


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_straight_through_gradient_by_hand(bits: int, strength: float) -> None:
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(bits))
    flow = torch.randn(5, 16, generator=torch.Generator().manual_seed(9))
    quantiser = fake_quant.FakeQuantisedWeight(schemes.Scheme("int", bits, 8))
    quantiser.strength = strength
    leaf = weight.clone().requires_grad_()
    quantiser(leaf).backward(flow)
    expected = (1 - strength) * flow.double() + strength * reference(weight, bits, 8)(flow)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    clipped = int((reference(weight, bits, 8)(torch.ones_like(flow)) == 0).sum())
    assert 0 < clipped <= 10, "the range shows"


def test_blending() -> None:
    weight = torch.randn(4, 16)
    quantiser = fake_quant.FakeQuantisedWeight(schemes.Scheme("int", 2, 8))
    whole = quantiser(weight)
    quantiser.strength = 0.25
    torch.testing.assert_close(quantiser(weight), weight + 0.25 * (whole - weight), rtol=0, atol=0)
    quantiser.strength = 0.0
    assert torch.equal(quantiser(weight), weight)
    assert quantiser(weight).data_ptr() != weight.data_ptr(), "a parameter itself would be gone under ZeRO-3"
    assert torch.equal(quantiser.eval()(weight), whole), "what is measured is what will be deployed"


def test_inputs_are_blended_and_quantised_too() -> None:
    layer = nn.Linear(8, 3)
    fake_quant.attach(layer, schemes.SCHEMES["int8"])
    x, seen = torch.randn(2, 5, 8), []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for quantiser in fake_quant.quantisers(layer):
        quantiser.strength = 0.0
    layer(x)
    layer.eval()(x)
    assert torch.equal(seen[0], x)
    scale = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / 255
    assert 0 < (seen[1] - x).abs().max() <= 0.51 * scale.max()
    assert len(fake_quant.quantisers(layer)) == 2


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_gradient_of_8_bit_floats_is_whole(strength: float) -> None:
    """1 everywhere: nothing is clipped, and no gradient, however small, goes through 8 bits itself."""
    for kind in (
        fake_quant.FakeQuantisedWeight(schemes.SCHEMES["fp8"]),
        fake_quant.FakeQuantisedInput(schemes.SCHEMES["fp8"], nn.Linear(2, 2)),
    ):
        kind.strength = strength
        leaf, flow = torch.randn(8, 256, requires_grad=True), torch.randn(8, 256) * 1e-4
        kind(leaf).backward(flow)
        torch.testing.assert_close(leaf.grad, flow, rtol=1e-6, atol=0)
        assert not torch.equal(kind(leaf), leaf)
        assert torch.equal(kind(torch.zeros(2, 8)), torch.zeros(2, 8)), "a token or row of zeros stays one"


class Mask(nn.Module):
    """What a pruning adds."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(shape.numel()).view(shape) % 3 > 0).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("first", ["mask", "quantiser"])
@pytest.mark.parametrize("name", ["int2", "ternary"])
def test_masks_and_quantisers_share_a_weight(first: str, name: str) -> None:
    torch.manual_seed(0)
    layer, how = nn.Linear(16, 4), schemes.scheme(name, 8, "here")
    adding = [
        lambda: parametrize.register_parametrization(layer, "weight", Mask(layer.weight.shape), unsafe=True),
        lambda: fake_quant.attach(layer, how),
    ]
    for add in adding if first == "mask" else reversed(adding):
        add()
    layer.eval()
    before = layer.weight.detach().clone()
    assert (before.flatten()[::3] == 0).all()
    fake_quant.detach(layer)
    assert torch.equal(layer.weight, before)
    assert [type(each) for each in layer.parametrizations.weight] == [Mask], "left for the pruning to carry out"  # type: ignore[union-attr, arg-type]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert torch.equal(layer.weight, before)
    fake_quant.detach(layer)


@pytest.mark.parametrize(("name", "group_size"), ALL)
def test_taken_apart_nothing_is_left_but_the_values(name: str, group_size: Any) -> None:
    how = schemes.scheme(name, group_size, "here")
    model = attached(models.causal_lm().train(), how)
    model(models.tokens()).logits.sum().backward()
    copy.deepcopy(model)  # torchao's quantisers alone would keep graphs, which cannot be copied
    expected = model.eval()(models.tokens()).logits
    for layer in linears(model, None, None, "here").values():
        fake_quant.detach(layer)
        assert not layer._forward_pre_hooks
    assert not fake_quant.quantisers(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert model.state_dict().keys() == models.causal_lm().state_dict().keys()
    if not how.inputs:
        assert torch.equal(model(models.tokens()).logits, expected)


def test_bits_follow_a_checkpoint() -> None:
    two, four = (attached(models.causal_lm(), schemes.Scheme("int", bits, 8)) for bits in (2, 4))
    two.load_state_dict(four.state_dict())
    assert not torch.equal(two(models.tokens()).logits, four(models.tokens()).logits)
    fake_quant.follow_checkpoint(two)
    assert torch.equal(two(models.tokens()).logits, four(models.tokens()).logits)
