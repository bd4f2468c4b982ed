"""Quantisation that is computed in floats, so that it can be trained through.

The fake quantisers are torchao's (`torchao.quantization.qat`), as parametrizations of `weight` and a hook on the input instead of other
modules, so that masks and factors can share the weight with them. With bits b, of each group of weights in a row (torchao's symmetric map):

    s = max|w| / ((2^b − 1) / 2),   q = clip(round(w / s), −2^(b−1), 2^(b−1) − 1),   w' = q · s

The gradient passes straight through the rounding and is 0 where q was clipped, `∂w'/∂w = [−2^(b−1) ≤ round(w / s) ≤ 2^(b−1) − 1]`; s
counts as a constant. The largest weight of a group always comes to ±(2^(b−1) − ½), a tie that float32 breaks either way: above 0 it is
clipped or not, below 0 its level is the lowest or the next. So runs that differ in the last bit part sooner than in floats. Inputs, where a
scheme has them, are 8-bit per token with a zero point, on the range `[min(x, 0), max(x, 0)]`. fp8 rounds to e4m3 with `s = max|w| / 448` of
a row or token; nothing is clipped, and its gradient is 1 everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.compress.schemes import Scheme
from distill.compress.ternary import ternary
from distill.types import ConfigError


def weight_quantiser(how: Scheme, key: str = "QuantizationAwareTraining") -> Callable[[Tensor], Tensor]:
    """The function from weights `[out, in]` to their quantised values, in floats; with the gradient that the head of this file names.

    Raises:
        ConfigError: torchao is not installed.
    """
    if how.kind == "ternary":
        return lambda weight: ternary(weight, how.group_size)
    qat = _torchao_qat(key)
    if how.kind == "fp8":
        return _float8(qat)
    dtype = getattr(torch, f"int{how.bits}")
    granularity: dict[str, Any] = {"granularity": "per_channel"} if how.group_size is None else {"group_size": how.group_size}
    # scale_precision None: of the weight's dtype, as what torchao infers from its own base configs
    return _forgetful(qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(dtype, scale_precision=None, **granularity)))


def input_quantiser(how: Scheme, key: str = "QuantizationAwareTraining") -> Callable[[Tensor], Tensor]:
    """The function from inputs `[…, in]` to their quantised values, in floats: int8 with a zero point, or fp8, one scale a token."""
    qat = _torchao_qat(key)
    if how.kind == "fp8":
        return _float8(qat)
    return _forgetful(qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)))


def _torchao_qat(key: str) -> Any:
    try:
        from torchao.quantization import qat
    except ImportError:
        raise ConfigError(f"{key} needs torchao, which is not installed: pip install 'torchao>=0.18'") from None
    return qat


def _float8(qat: Any) -> Callable[[Tensor], Tensor]:
    # torchao's backward casts the gradient to 8 bits and loses nearly all of it; a row of zeros must not be divided by its maximum
    quantiser = qat.Float8FakeQuantizer(qat.Float8FakeQuantizeConfig(hp_value_lb=1e-12))
    return lambda value: cast(Tensor, _StraightThrough.apply(value, quantiser))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, quantiser: Callable[[Tensor], Tensor]) -> Tensor:
        return quantiser(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _forgetful(quantiser: Any) -> Callable[[Tensor], Tensor]:
    # torchao's keep the scale of the last call, which would hold memory, and keep the module from being copied
    def call(value: Tensor) -> Tensor:
        quantised: Tensor = quantiser(value)
        quantiser.scale = quantiser.zero_point = None
        return quantised

    return call


class _Blended(nn.Module):
    """`x + λ (q(x) − x)` in training, q(x) in `eval`: what is measured is what will be deployed.

    Attributes:
        strength: λ, from 0 to 1.
        owner: who made it, to find it again in a copy of the model.
    """

    quantise: Callable[[Tensor], Tensor]

    def __init__(self, owner: int) -> None:
        super().__init__()
        self.strength, self.owner = 1.0, owner

    def forward(self, value: Tensor) -> Tensor:
        """Quantise as far as λ says."""
        strength = self.strength if self.training else 1.0
        if strength == 0.0:
            return value.clone()  # ZeRO-3 lets a parameter go as soon as the module that holds it is done
        quantised = self.quantise(value)
        return quantised if strength == 1.0 else value + strength * (quantised - value)


class FakeQuantisedWeight(_Blended):
    """Parametrization of a linear layer's weight.

    The bits are a buffer too, so that a checkpoint brings them back; see `follow_checkpoint`.

    Args:
        how: the scheme.
        owner: who made it, to find it again in a copy of the model.
    """

    bits: Tensor

    def __init__(self, how: Scheme, owner: int = 0) -> None:
        super().__init__(owner)
        self.register_buffer("bits", torch.tensor(how.bits, dtype=torch.int8))
        self.how = how
        self.quantise = weight_quantiser(how)

    def follow_checkpoint(self) -> None:
        """Take the bits of the buffer, after it was loaded; not at each call, for which a GPU would have to be waited for."""
        if int(self.bits) != self.how.bits:
            self.how = replace(self.how, bits=int(self.bits))
            self.quantise = weight_quantiser(self.how)


class FakeQuantisedInput(_Blended):
    """Child of a linear layer that quantises its input, with the handle of the hook that calls it."""

    def __init__(self, how: Scheme, layer: nn.Linear, owner: int = 0) -> None:
        super().__init__(owner)
        self.quantise = input_quantiser(how)
        self.handle = layer.register_forward_pre_hook(_quantise_input)


def attach(layer: nn.Linear, how: Scheme, owner: int = 0) -> None:
    """Fake-quantise a layer's weight, after what parametrises it already, and its input where the scheme says so; see `detach`."""
    parametrize.register_parametrization(layer, "weight", FakeQuantisedWeight(how, owner).train(layer.training), unsafe=True)
    if how.inputs:
        layer.fake_quantised_input = FakeQuantisedInput(how, layer, owner).train(layer.training)


def _quantise_input(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.fake_quantised_input(args[0]), *args[1:])


def quantisers(model: nn.Module, owner: int | None = None) -> list[_Blended]:
    """The fake quantisers of a model, of weights and inputs: all, or one owner's."""
    return [module for module in model.modules() if isinstance(module, _Blended) and owner in (None, module.owner)]


def weights_of(model: nn.Module, owner: int = 0) -> dict[str, tuple[nn.Linear, FakeQuantisedWeight]]:
    """The linears whose weight this owner has fake-quantised, by the dotted name that they have now, with their fake quantisers."""
    found: dict[str, tuple[nn.Linear, FakeQuantisedWeight]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
            ours = [each for each in chain if isinstance(each, FakeQuantisedWeight) and each.owner == owner]
            if ours:
                found[name] = layer, ours[0]
    return found


def stored(layer: Any) -> Tensor:
    """The tensor behind a linear's weight that the optimizer changes, whatever parametrises it."""
    found: Tensor = layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight
    return found


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Leave weights and inputs as they are, in `eval` as well."""
    before = [(module, module.quantise) for module in quantisers(model)]
    for module, _ in before:
        module.quantise = torch.clone
    try:
        yield
    finally:
        for module, quantise in before:
            module.quantise = quantise


def follow_checkpoint(model: nn.Module) -> None:
    """Have all weights quantised to the bits that a checkpoint has brought."""
    for module in model.modules():
        if isinstance(module, FakeQuantisedWeight):
            module.follow_checkpoint()


@torch.no_grad()
def detach(layer: nn.Linear) -> None:
    """Take the fake quantisers out and leave the quantised values as the weight; other parametrizations stay, on quantised values."""
    ours = layer._modules.pop("fake_quantised_input", None)
    if isinstance(ours, FakeQuantisedInput):
        ours.handle.remove()
    if not parametrize.is_parametrized(layer, "weight"):
        return
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    for module in [each for each in chain if isinstance(each, FakeQuantisedWeight)]:
        chain.eval()
        value = layer.weight.detach().clone()
        if len(chain) == 1:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        else:  # torch takes out all or none; the list is an ordinary one
            del chain[list(chain).index(module)]
            chain.original.copy_(value)
