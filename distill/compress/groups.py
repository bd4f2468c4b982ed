"""Neurons, heads and layers as groups of weights: what each is worth, and which stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.compress import structured
from distill.compress.families import family_of, layers_of, linear
from distill.compress.sparsity import kept_of, largest
from distill.types import ConfigError

Structure = Literal["neurons", "heads", "kv_groups", "layers"]


@dataclass(frozen=True)
class Groups:
    """The groups of one layer, all alike.

    Attributes:
        count: how many there are.
        rows: dotted names of the linears whose rows are shared out among them, first to last.
        columns: dotted name of the one whose columns are, and where a mask takes a group out: nothing of it goes on from there.
            None where the group is the whole layer.
        alone: groups that are compared with each other: those of the layer, or a part of them that must lose as many as any other.
    """

    count: int
    rows: tuple[str, ...]
    columns: str | None
    alone: int

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that have weights in a group."""
        return self.rows if self.columns is None else (*self.rows, self.columns)

    def worth(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Add the scores of a group's weights up: `Σ_w∈group score(w)`, `[count]`.

        Args:
            scores: by name of the linear, `[out, in]`; of all, or of those that count.
        """
        sums = [scores[name].sum(1) for name in self.rows if name in scores]
        if self.columns is not None:
            sums.append(scores[self.columns].sum(0))
        return torch.stack([each.view(self.count, -1).sum(1) for each in sums]).sum(0)


def groups_of(model: PreTrainedModel, structure: Structure) -> list[Groups]:
    """Find the groups of every layer, first to last.

    Raises:
        ConfigError: this model has none of them that could be taken out.
    """
    family, layers, config = family_of(model), layers_of(model), model.config
    names = {id(module): name for name, module in model.named_modules()}
    if structure in ("heads", "kv_groups"):
        structured.heads_config(model, 1, 1)
    found = []
    for layer in layers:
        path = lambda name: names[id(linear(layer, name))]  # noqa: B023, E731  # called in this turn
        if structure == "layers":
            inside = tuple(names[id(module)] for module in layer.modules() if isinstance(module, torch.nn.Linear))
            found.append(Groups(1, inside, None, len(layers)))
        elif structure == "neurons":
            count = config.intermediate_size
            found.append(Groups(count, tuple(path(name) for name in family.ffn_in), path(family.ffn_out), count))
        elif structure == "kv_groups" or config.num_attention_heads == config.num_key_value_heads:
            rows = tuple(path(name) for name in (family.query, family.key, family.value))
            found.append(Groups(config.num_key_value_heads, rows, path(family.out), config.num_key_value_heads))
        else:
            count = config.num_attention_heads
            found.append(Groups(count, (path(family.query),), path(family.out), count // config.num_key_value_heads))
    if found[0].alone == 1:
        raise ConfigError(f"structure: the model has a single one of its {structure} to choose from, so none can be taken out")
    return found


def kept_groups(model: PreTrainedModel, structure: Structure, sparsity: float) -> int:
    """How many of those that are compared with each other stay: the next number, from `sparsity` upwards, that transformers can load."""
    one = groups_of(model, structure)[0]
    fewest = kept_of(one.alone, sparsity)
    return next((kept for kept in range(fewest, one.alone) if _loadable(model, structure, one, kept)), one.alone)


def loadable_counts(model: PreTrainedModel, structure: Structure) -> list[int]:
    """All numbers, but the whole, of those that are compared with each other that transformers can load; rising."""
    one = groups_of(model, structure)[0]
    return [kept for kept in range(1, one.alone) if _loadable(model, structure, one, kept)]


def _loadable(model: PreTrainedModel, structure: Structure, one: Groups, kept: int) -> bool:
    return structured.loadable(model.config, _changes(model, structure, kept * one.count // one.alone))


def _changes(model: PreTrainedModel, structure: Structure, count: int) -> dict[str, int]:
    config = model.config
    if structure in ("neurons", "layers"):
        return {"intermediate_size": count} if structure == "neurons" else {}
    shared = config.num_attention_heads // config.num_key_value_heads
    whole = structure == "kv_groups" or shared == 1
    return (
        structured.heads_config(model, count * shared, count)
        if whole
        else structured.heads_config(model, count, config.num_key_value_heads)
    )


def choose(worths: Sequence[Tensor], structure: Structure, alone: int, kept: int) -> list[Tensor]:
    """Mark the groups that stay: of those that are compared with each other the most worth, as many everywhere.

    Args:
        worths: of each layer, `[count]`; for `layers` `[1]`.
        structure: what the groups are.
        alone: how many are compared with each other.
        kept: how many of these stay.

    Returns:
        For each layer `[count]`, bool.
    """
    if structure == "layers":
        return list(largest(torch.cat(list(worths))[None], kept)[0].split(1))
    return [largest(worth.view(-1, alone), kept).flatten() for worth in worths]


def remove(model: PreTrainedModel, structure: Structure, kept: Sequence[Tensor]) -> None:
    """Take out the groups that are not marked, in place.

    Args:
        model: without parametrizations on what is cut.
        structure: what the groups are.
        kept: as of `choose`.
    """
    if structure == "layers":
        structured.remove_layers(model, [i for i, mark in enumerate(kept) if mark])
        return
    cut: dict[str, Callable[[PreTrainedModel, Sequence[Tensor]], None]] = {
        "neurons": structured.remove_neurons,
        "kv_groups": structured.remove_kv_groups,
        "heads": structured.remove_query_heads,
    }
    same = structure == "heads" and model.config.num_attention_heads == model.config.num_key_value_heads
    cut["kv_groups" if same else structure](model, [mark.nonzero().flatten() for mark in kept])
