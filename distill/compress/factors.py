"""A linear layer of two factors, and a model whose linear layers are such; how it is saved, loaded and multiplied out again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from distill.compress.integers import forget

METHOD = "low_rank"


class Factored(nn.Module):
    """`y = B (A x) + b`: the place of a linear layer, with two smaller ones inside.

    The buffer `weight` holds nothing. It is there for who loads a saved model without this package: transformers would leave the dense
    weight that it misses random, with a warning; a weight of another shape it refuses.

    Args:
        in_features: width of x.
        out_features: width of y.
        rank: r; A is `[r, in]`, B is `[out, r]`.
        bias: whether there is a b.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)
        self.register_buffer("weight", torch.zeros(1, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return self.second(self.first(x))


def shapes(model: nn.Module) -> dict[str, int]:
    """The rank of every factored layer, by dotted name; none in a model that is dense."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, Factored)}


def put_factors(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put factored layers in the places of linear ones; their weights are new.

    Args:
        model: changed.
        ranks: by dotted name of a linear layer.
    """
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
        place = linear.weight
        with torch.device(place.device):
            factored = Factored(linear.in_features, linear.out_features, rank, linear.bias is not None).to(place.dtype)
        model.set_submodule(name, factored.train(linear.training))


def label(model: PreTrainedModel) -> None:
    """Write the ranks into the model's config, so that a saved folder says of itself how it is to be loaded."""
    model.config.quantization_config = LowRankConfig(shapes(model)).to_dict()


@torch.no_grad()
def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """Change a model back to dense layers, `W = B A`: as large as before the cut, for what reads stock models alone; gives it back."""
    for name in shapes(model):
        factored = model.get_submodule(name)
        assert isinstance(factored, Factored)
        forget(model, f"{name}.")
        weight = (factored.second.weight.double() @ factored.first.weight.double()).to(factored.second.weight.dtype)
        linear = nn.Linear(factored.in_features, factored.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), factored.second.bias
        model.set_submodule(name, linear.train(factored.training))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


# transformers asks a quantiser to prepare the modules before it reads weights into them. That is its one public hook for a model whose
# modules differ from what its config alone would make, so factored models come as one more method of quantisation.


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """What `config.json` says of a factored model: `{"quant_method": "low_rank", "ranks": {name: rank}}`."""

    def __init__(self, ranks: Mapping[str, int], **_: Any) -> None:
        self.quant_method, self.ranks = METHOD, dict(ranks)


@register_quantizer(METHOD)
class LowRankLoader(HfQuantizer):
    """Puts factored layers where the config says, then steps back: nothing is quantised, and all of it can be trained and cast."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        put_factors(model, self.quantization_config.ranks)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)  # several modules share a config
        label(model)

    def is_serializable(self) -> bool:
        """It is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It is."""
        return True
