"""Cutting the hidden size: the channels of the residual stream, through every module that reads or writes them."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.compress.families import Family, family_of, layers_of, linear
from distill.compress.importance import norms_of
from distill.compress.structured import head_dim
from distill.types import ConfigError

# Those whose every use of the hidden size was looked at. Gemma, for one, multiplies its embeddings by the root of it
TYPES = ("llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "xlm-roberta", "camembert")


def check_width(model_type: str) -> None:
    """Refuse an architecture whose hidden size cannot be cut.

    Raises:
        ConfigError: it is none of `TYPES`.
    """
    if model_type not in TYPES:
        raise ConfigError(f"the hidden size of a model of type '{model_type}' cannot be cut; of these it can: {', '.join(TYPES)}")


def remove_channels(model: PreTrainedModel, keep: Tensor, kept_energy: dict[str, float] | None = None) -> None:
    """Leave these channels of the residual stream, in place: columns of what reads them, rows of what writes them, gains, embeddings.

    An RMSNorm divides by the root mean square of what is left, which differs from that of the whole; so that its output stays what it was,
    its gain is multiplied by `sqrt(ρ D / D')`, where ρ is the share of the energy `Σ x²` in the D' of D channels that stay.

    Args:
        model: of one of `TYPES`; `config.hidden_size` follows, and the width of a head stays.
        keep: `[D']`, indices in any order.
        kept_energy: ρ of each RMSNorm by name; None leaves the gains as they are.

    Raises:
        ConfigError: another architecture, or no such channels.
    """
    before, family = model.config.hidden_size, family_of(model)
    keep = keep.sort().values
    if not len(keep) or keep[0] < 0 or keep[-1] >= before or len(keep.unique()) < len(keep):
        raise ConfigError(f"channels to keep must be 1 to {before} different numbers from 0 to {before - 1}")
    if len(keep) == before:
        return
    check_width(model.config.model_type)
    if family.head_dim:
        model.config.head_dim = head_dim(model)  # else it would follow the hidden size
    norms = norms_of(model)
    for name in norms:
        norm = model.get_submodule(name)
        select(norm, 0, keep)
        if kept_energy is not None and not isinstance(norm, nn.LayerNorm):
            norm.weight.data.mul_(math.sqrt(kept_energy[name] * before / len(keep)))
    inside = _cut_layers(model, family, keep)
    _cut_outside(model, inside, keep)
    model.config.hidden_size = len(keep)
    for module in model.modules():
        if isinstance(getattr(module, "hidden_size", None), int):  # a note that some modules keep
            module.hidden_size = len(keep)
    model.tie_weights()


def remove_heads_of_bert(model: PreTrainedModel, keep: list[Tensor], width: int) -> None:
    """Leave these heads in each layer of an encoder whose config has no `head_dim`, in place.

    What is left can be loaded where the hidden size is cut to the width of so many heads, see `remove_channels`.

    Args:
        model: of BERT's family; `config.num_attention_heads` follows.
        keep: for each layer the indices that stay, `[n]` with the same n everywhere.
        width: of a head.
    """
    family = family_of(model)
    for layer, heads in zip(layers_of(model), keep, strict=True):
        rows = (heads.sort().values[:, None] * width + torch.arange(width, device=heads.device)).flatten()
        for name in (family.query, family.key, family.value):
            select(linear(layer, name), 0, rows)
        select(linear(layer, family.out), 1, rows)
        attention = layer.get_submodule(family.attention)
        attention.num_attention_heads, attention.all_head_size = len(heads), len(rows)  # type: ignore[assignment]
    model.config.num_attention_heads = len(keep[0])


def select(module: nn.Module, dim: int, keep: Tensor) -> None:
    """Leave these entries of a linear's rows (dim 0) or columns (dim 1), an embedding's columns (dim 1), or a norm's channels (dim 0)."""
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None and dim < parameter.ndim:
            kept = parameter.detach().index_select(dim, keep.to(parameter.device))
            setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def _cut_layers(model: PreTrainedModel, family: Family, keep: Tensor) -> set[nn.Module]:
    """Cut the linears of the layers, and give every module inside them."""
    for layer in layers_of(model):
        for name in (*family.ffn_in, family.query, family.key, family.value):
            select(linear(layer, name), 1, keep)
        for name in (family.out, family.ffn_out):
            select(linear(layer, name), 0, keep)
    return {module for layer in layers_of(model) for module in layer.modules()}


def _cut_outside(model: PreTrainedModel, inside: set[nn.Module], keep: Tensor) -> None:
    """Cut embeddings, poolers and heads. What is called `dense` there maps the hidden size to itself, in every architecture of `TYPES`."""
    for name, module in model.named_modules():
        if module in inside or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        select(module, 1, keep)
        if name.endswith("dense"):
            select(module, 0, keep)
