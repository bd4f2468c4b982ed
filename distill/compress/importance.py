"""How much each part of a model does: its layers, heads, neurons and the channels of its residual stream."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill.checks import evaluating
from distill.compress.families import Family, family_of, layers_of, linear
from distill.compress.norms import at
from distill.compress.structured import head_dim
from distill.tasks import Task
from distill.types import Batch

Measure = tuple[
    tuple[str, ...], Callable[..., Tensor]
]  # taps, and a function of what is there at each valid position, `[N, D]` -> `[N, …]`


@dataclass(frozen=True)
class Importance:
    """Scores, the higher the more important; they compare parts of one kind.

    Attributes:
        neurons: for each layer `[intermediate]`.
        heads: for each layer `[heads]`, of the queries.
        channels: `[hidden]`, of the residual stream.
        energies: by the name of each norm `[hidden]`, the mean square of each channel of what it normalises.
        layers: `[layers]`, the block influence; None where it was not measured.
    """

    neurons: list[Tensor]
    heads: list[Tensor]
    channels: Tensor
    energies: dict[str, Tensor]
    layers: Tensor | None = None


def by_activation(model: PreTrainedModel, task: Task, batches: Iterable[Batch]) -> Importance:
    """Measure on a few batches, as Minitron does (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2).

    Neuron: mean `|activation|` where it enters the second linear. Head: mean norm of what it hands to the output projection. Channel: mean
    `|activation|` of what the norms give, over all norms. Layer: `block_influence`.

    Args:
        model: of a known family; run where it is.
        task: how to run it.
        batches: some hundred sequences are enough.
    """
    family, size, norms = family_of(model), head_dim(model), norms_of(model)
    names = [_name(model, layer) for layer in layers_of(model)]
    measures: dict[str, Measure] = {}
    for name in names:
        measures[f"neurons of {name}"] = ((f"{name}.{family.ffn_out}:input",), torch.abs)
        measures[f"heads of {name}"] = ((f"{name}.{family.out}:input",), lambda x: x.unflatten(-1, (-1, size)).norm(dim=-1))
        measures[f"influence of {name}"] = ((f"{name}:input", name), block_influence)
    for name in norms:
        measures[f"energy of {name}"] = ((f"{name}:input",), torch.square)
        measures[f"channels of {name}"] = ((name,), torch.abs)
    found = means(model, task, batches, measures)
    return Importance(
        neurons=[found[f"neurons of {name}"] for name in names],
        heads=[found[f"heads of {name}"] for name in names],
        channels=torch.stack([found[f"channels of {name}"] for name in norms]).mean(0),
        energies={name: found[f"energy of {name}"] for name in norms},
        layers=torch.stack([found[f"influence of {name}"] for name in names]),
    )


def by_weights(model: PreTrainedModel) -> Importance:
    """Score by the weights alone, without any data.

    Neuron: the product of the norms of its rows in and of its column out. Head: the norm of its value rows times that of its columns in the
    output projection. Channel: the norm of all rows that write to it, an average token's embedding among them. Layers have no such score.

    Args:
        model: of a known family.
    """
    family, size, layers = family_of(model), head_dim(model), layers_of(model)
    embedding = model.get_input_embeddings().weight.detach().double().cpu()
    written = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    if embedding.shape[1] == len(written):  # Electra projects narrower ones
        written = embedding.square().mean(0)
    for layer in layers:
        for name in (family.out, family.ffn_out):
            written = written + _rows(layer, name).square()
    return Importance(
        neurons=[_product(_rows(layer, name) for name in family.ffn_in) * _columns(layer, family.ffn_out) for layer in layers],
        heads=[_heads(layer, family, size) for layer in layers],
        channels=written.sqrt(),
        energies=dict.fromkeys(norms_of(model), written),
    )


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """Give `1 − cos(x_in, x_out)` of each position: what a layer changes of the direction (Men et al. 2024, ShortGPT, arXiv 2403.03853).

    Args:
        before: `[N, D]`, what enters the layer.
        after: `[N, D]`, what leaves it.
    """
    return 1 - F.cosine_similarity(before, after, dim=-1)


def means(model: PreTrainedModel, task: Task, batches: Iterable[Batch], measures: Mapping[str, Measure]) -> dict[str, Tensor]:
    """Run a model and take the mean of each measure over the valid positions of all batches.

    Args:
        model: run in evaluation mode, where it is.
        task: how to run it.
        batches: of the data; padding does not count.
        measures: by any name.

    Returns:
        By the same names, on the CPU in float64.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(measures, 0)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            here = {name: value.to(model.device) for name, value in batch.items()}
            taps = task.outputs(model, here, {tap for wanted, _ in measures.values() for tap in wanted}).taps
            valid = here.get("attention_mask", torch.ones_like(here["input_ids"])).bool()
            for name, (wanted, function) in measures.items():
                rows = [at(taps[tap], valid).float() for tap in wanted]
                total = function(*rows).sum(0).double().cpu()
                sums[name] = sums[name] + total if name in sums else total
                counts[name] += len(rows[0])
    assert sums, "there are no calibration batches"
    return {name: total / counts[name] for name, total in sums.items()}


def norms_of(model: PreTrainedModel) -> list[str]:
    """The norms of the residual stream by dotted name; not those of queries and keys, which some architectures have."""
    inside = {id(module) for layer in layers_of(model) for module in layer.get_submodule(family_of(model).attention).modules()}
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and id(module) not in inside and _gain(module).shape == (model.config.hidden_size,)
    ]


def _gain(norm: nn.Module) -> Tensor:
    gain = norm.weight
    assert isinstance(gain, Tensor)
    return gain


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _rows(layer: nn.Module, name: str) -> Tensor:
    """Norms of the rows of a linear, `[out]`, their biases counted."""
    found = linear(layer, name)
    squares = found.weight.detach().double().cpu().square().sum(1)
    return (squares if found.bias is None else squares + found.bias.detach().double().cpu().square()).sqrt()


def _columns(layer: nn.Module, name: str) -> Tensor:
    return linear(layer, name).weight.detach().double().cpu().norm(dim=0)


def _product(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).prod(0)


def _heads(layer: nn.Module, family: Family, size: int) -> Tensor:
    out = _columns(layer, family.out).unflatten(0, (-1, size)).norm(dim=1)  # [heads]
    value = _rows(layer, family.value).unflatten(0, (-1, size)).norm(dim=1)  # [groups]
    return out * value.repeat_interleave(len(out) // len(value))
