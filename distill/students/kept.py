"""What stays of a model when a student is cut out of it: chosen by scores, then carried out."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.compress.families import family_of
from distill.compress.importance import Importance
from distill.compress.structured import head_dim, remove_kv_groups, remove_layers, remove_neurons, remove_query_heads
from distill.compress.width import remove_channels, remove_heads_of_bert
from distill.students.sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Kept:
    """Indices into a model before anything is cut; those of heads count the groups that stay.

    Attributes:
        sizes: of what is left.
        layers: that stay.
        channels: `[hidden]`.
        energy: the share of the residual's energy in these channels, by norm.
        groups: for each layer that stays `[groups]`, of keys and values.
        heads: for each layer that stays `[heads]`, of the queries in its groups.
        neurons: for each layer that stays `[intermediate]`.
    """

    sizes: Sizes
    layers: list[int]
    channels: Tensor
    energy: dict[str, float]
    groups: list[Tensor]
    heads: list[Tensor]
    neurons: list[Tensor]


def kept_of(scores: Importance, before: Sizes, after: Sizes, layers: list[int]) -> Kept:
    """Keep the highest scores of each kind; a group of queries scores their sum.

    Args:
        scores: of the whole model.
        before: sizes of the model.
        after: sizes of what is left.
        layers: that stay.
    """
    channels = best(scores.channels, after.hidden)
    in_groups = [scores.heads[i].unflatten(0, (before.groups, -1)) for i in layers]  # [groups, queries]
    groups = [best(heads.sum(1), after.groups) for heads in in_groups]
    size, most = after.heads // after.groups, before.heads // before.groups
    heads = [
        torch.cat([best(heads[group], size) + place * most for place, group in enumerate(kept)])
        for heads, kept in zip(in_groups, groups, strict=True)
    ]
    return Kept(
        sizes=after,
        layers=layers,
        channels=channels,
        energy={name: float(energy[channels].sum() / energy.sum()) for name, energy in scores.energies.items()},
        groups=groups,
        heads=heads,
        neurons=[best(scores.neurons[i], after.intermediate) for i in layers],
    )


def best(scores: Tensor, count: int) -> Tensor:
    """The indices of the highest scores, in rising order; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def uniform(before: int, after: int) -> list[int]:
    """Layers spread evenly over a model, the first and the last among them; of one layer the first."""
    return [round(i * (before - 1) / max(1, after - 1)) for i in range(after)]


def cut(model: PreTrainedModel, kept: Kept) -> None:
    """Leave in a model what stays, in place; with everything kept nothing is touched.

    Args:
        model: as it was when `kept` was chosen, or with other weights.
        kept: of the model.
    """
    before, after, width = sizes_of(model), kept.sizes, head_dim(model)
    remove_channels(model, kept.channels, kept.energy)  # first: the names of norms are still those of the whole, and so heads may follow
    if after.layers < before.layers:
        remove_layers(model, kept.layers)
    if not family_of(model).head_dim:
        if after.heads < before.heads:
            remove_heads_of_bert(model, kept.groups, width)  # a head is a group of its own there
    else:
        if after.groups < before.groups:
            remove_kv_groups(model, kept.groups, after.heads)
        if after.heads * before.groups < before.heads * after.groups:
            remove_query_heads(model, kept.heads)
    if after.intermediate < before.intermediate:
        remove_neurons(model, kept.neurons)
