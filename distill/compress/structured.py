"""Taking neurons, heads and layers out of a model, so that stock transformers loads what is left."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from distill.compress.factors import label, shapes
from distill.compress.families import Family, family_of, layers_of, linear
from distill.types import ConfigError


def remove_neurons(model: PreTrainedModel, keep: Sequence[Tensor]) -> None:
    """Leave these neurons of each layer's feed-forward network, in place: their rows going in, their columns coming out.

    What is left computes what the whole computes where the columns of all others are zero.

    Args:
        model: of a known family, see `families`; `config.intermediate_size` follows.
        keep: for each layer the indices that stay, `[n]` with the same n everywhere, for a config holds one width.

    Raises:
        ConfigError: another family, or numbers that a config cannot hold.
    """
    family, layers = family_of(model), layers_of(model)
    count = _check(model, keep, "neurons", model.config.intermediate_size, {"intermediate_size": _first(keep)})
    for layer, rows in zip(layers, keep, strict=True):
        for name in family.ffn_in:
            _cut(linear(layer, name), rows, 0)
        _cut(linear(layer, family.ffn_out), rows, 1)
        for module in layer.modules():
            if isinstance(getattr(module, "intermediate_size", None), int):  # a note that LlamaMLP keeps of its width
                module.intermediate_size = count  # type: ignore[assignment]
    model.config.intermediate_size = count


def remove_kv_groups(model: PreTrainedModel, keep: Sequence[Tensor], heads: int | None = None) -> None:
    """Leave these groups of grouped-query attention in each layer, in place: a key, a value, and all queries that look at them.

    Without grouped queries a group is a head.

    Args:
        model: of a family whose config says `head_dim`; `num_attention_heads`, `num_key_value_heads` and `head_dim` follow.
        keep: for each layer the indices that stay, `[n]` with the same n everywhere.
        heads: that the model will have once queries have left the groups, too: these are what a config must hold, not those on the way.

    Raises:
        ConfigError: another family, or numbers that a config cannot hold.
    """
    family, groups, size = _attention(model)
    n = _first(keep)
    _check(model, keep, "groups of keys and values", groups, heads_config(model, heads or n * size, n))
    for layer, kept in zip(layers_of(model), keep, strict=True):
        queries = _spread(kept, size)
        _cut_heads(model, layer, family, queries)
        for name in (family.key, family.value):
            _cut(linear(layer, name), _spread(kept, head_dim(model)), 0)
    _set_heads(model, family, n * size, n)


def remove_query_heads(model: PreTrainedModel, keep: Sequence[Tensor]) -> None:
    """Leave these queries of grouped-query attention in each layer, in place; all keys and values stay.

    Args:
        model: as of `remove_kv_groups`.
        keep: for each layer the indices of the heads that stay, `[n]`, the same number of every group; group g has the heads
            g · size … (g + 1) · size − 1.

    Raises:
        ConfigError: another family, numbers that a config cannot hold, or groups of different sizes.
    """
    family, groups, size = _attention(model)
    n = _first(keep)
    _check(model, keep, "heads", groups * size, heads_config(model, n, groups))
    for i, kept in enumerate(keep):
        sizes = torch.bincount(kept // size, minlength=groups).tolist()
        if len(set(sizes)) > 1:
            raise ConfigError(f"layer {i} would keep {sizes} queries in its groups; a model of transformers has as many in each")
    for layer, kept in zip(layers_of(model), keep, strict=True):
        _cut_heads(model, layer, family, kept.sort().values)
    _set_heads(model, family, n, groups)


def remove_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Leave these layers, in place.

    Args:
        model: of a known family; `num_hidden_layers`, and `layer_types` where there is one, follow.
        keep: indices that stay, at least one; their order is the model's.

    Raises:
        ConfigError: another family, or no such layer.
    """
    family, layers = family_of(model), layers_of(model)
    kept = sorted(set(keep))
    if not kept or kept[0] < 0 or kept[-1] >= len(layers):
        raise ConfigError(f"layers {list(keep)} cannot stay of a model that has {len(layers)}, numbered from 0")
    parent, _, name = family.layers.rpartition(".")
    setattr(model.base_model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in kept))
    for i, layer in enumerate(layers_of(model)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # where keys and values are cached
                module.layer_idx = i  # type: ignore[assignment]
    config = model.config
    kinds = getattr(config, "layer_types", None)  # of architectures whose layers differ
    if kinds is not None:
        config.layer_types = [kinds[i] for i in kept]
    config.num_hidden_layers = len(kept)
    if shapes(model):
        label(model)  # the names of factored layers have changed


def heads_config(model: PreTrainedModel, heads: int, groups: int) -> dict[str, int]:
    """Give the keys of a config that has so many heads in so many groups, each as wide as it is now.

    Raises:
        ConfigError: the model's config has no key for the width of a head.
    """
    if not family_of(model).head_dim:
        raise ConfigError(
            f"attention heads cannot be taken out of a model of type '{model.config.model_type}': transformers computes the width of a "
            "head from their number, so the rest could not be loaded; take neurons or layers"
        )
    return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim(model)}


def head_dim(model: PreTrainedModel) -> int:
    """The width of a head."""
    given: int | None = getattr(model.config, "head_dim", None)  # Qwen2's config need not have it
    return given or model.config.hidden_size // model.config.num_attention_heads


def loadable(config: Any, changes: dict[str, int]) -> bool:
    """Whether transformers takes a config with these changes; e.g. that of Llama wants a hidden size which its heads divide."""
    try:
        type(config).from_dict(copy.deepcopy(config.to_dict()) | changes)
    except (ValueError, StrictDataclassError):
        return False
    return True


def _attention(model: PreTrainedModel) -> tuple[Family, int, int]:
    """The family, the groups, and the queries in a group."""
    heads_config(model, 1, 1)
    config = model.config
    return family_of(model), config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads


def _first(keep: Sequence[Tensor]) -> int:
    return len(keep[0]) if keep else 0


def _check(model: PreTrainedModel, keep: Sequence[Tensor], what: str, most: int, changes: dict[str, int]) -> int:
    if len(keep) != len(layers_of(model)):
        raise ConfigError(f"{what} to keep are given for {len(keep)} layers, but the model has {len(layers_of(model))}")
    counts = [len(kept) for kept in keep]
    if len(set(counts)) > 1:
        raise ConfigError(f"the layers would keep {counts} {what}; a model of transformers has as many in each")
    if not counts[0] or any(kept.min() < 0 or kept.max() >= most or len(kept.unique()) < len(kept) for kept in keep):
        raise ConfigError(f"{what} to keep must be 1 to {most} different numbers from 0 to {most - 1} in every layer")
    if not loadable(model.config, changes):
        raise ConfigError(f"transformers takes no {type(model.config).__name__} with {changes}; keep another number of {what}")
    return counts[0]


def _spread(indices: Tensor, size: int) -> Tensor:
    """Indices of the rows of these heads, `[n · size]`, in the model's order."""
    return (indices.sort().values[:, None] * size + torch.arange(size, device=indices.device)).flatten()


def _cut_heads(model: PreTrainedModel, layer: nn.Module, family: Family, heads: Tensor) -> None:
    rows = _spread(heads, head_dim(model))
    _cut(linear(layer, family.query), rows, 0)
    _cut(linear(layer, family.out), rows, 1)


def _set_heads(model: PreTrainedModel, family: Family, heads: int, groups: int) -> None:
    for key, value in heads_config(model, heads, groups).items():
        setattr(model.config, key, value)
    for layer in layers_of(model):
        layer.get_submodule(family.attention).num_key_value_groups = heads // groups  # type: ignore[assignment]


def _cut(module: nn.Linear, keep: Tensor, dim: int) -> None:
    """Leave these rows (dim 0, with their biases) or columns (dim 1) of a linear."""
    assert not parametrize.is_parametrized(module), "parametrizations are removed first: they may hold tensors of the old shape"
    keep = keep.sort().values.to(module.weight.device)
    module.weight = _selected(module.weight, keep, dim)
    if dim == 0:
        module.out_features = len(keep)
        if module.bias is not None:
            module.bias = _selected(module.bias, keep, 0)
    else:
        module.in_features = len(keep)


def _selected(parameter: Tensor, keep: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, keep), requires_grad=parameter.requires_grad)
