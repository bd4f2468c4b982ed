"""The sizes of a model by kind of weight, and of students cut from it; counted on the `meta` device, no weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.compress.families import family_of
from distill.compress.structured import head_dim
from distill.layers import layers_of
from distill.plan.job import Shape
from distill.plan.models import shape_of
from distill.students.sizes import Sizes, sizes_of, smaller_config
from distill.tasks import Task
from distill.types import ConfigError

PARTS = 16  # a width is cut to so many parts of itself
MOST = 16  # depths that are looked at
NARROWEST = 4  # of these; below, layers go


@dataclass(frozen=True)
class Weights:
    """How many values of each kind a model has; what formats store differently.

    Attributes:
        parameters: all, tied ones once.
        blocks: of the linears inside the layers, and `block_rows` their outputs: what every integer format quantises.
        trunk: of the linears between the layers and the head, e.g. a pooler, and `trunk_rows` their outputs.
        head: of the linear that gives the logits, and `head_rows`; 0 where it is the embedding.
        tables: of the embeddings, and `table_rows`.
        tied: whether the embedding is the head as well.
        narrowest: the fewest inputs that a linear inside the layers has; groups of 32 must divide all.
        groups: whether groups of 32 do.
    """

    parameters: int
    blocks: int
    block_rows: int
    trunk: int
    trunk_rows: int
    head: int
    head_rows: int
    tables: int
    table_rows: int
    tied: bool
    groups: bool


def weights_of(model: nn.Module) -> Weights:
    """Count a model of transformers by kind; on any device.

    Raises:
        ConfigError: its layers are in no list.
    """
    layers = layers_of(model, "--teacher")
    if not layers.blocks:
        raise ConfigError(
            f"--teacher: cannot find the layers of {type(model).__name__}; take an architecture of transformers with a list of layers"
        )
    inside = [m for name in layers.blocks for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    shared = {id(table.weight) for table in tables}
    trunk_ids = {id(m) for m in model.base_model.modules()}  # type: ignore[union-attr]
    trunk = [m for m in linears if id(m) in trunk_ids and not any(m is other for other in inside)]
    head = [m for m in linears if id(m) not in trunk_ids and id(m.weight) not in shared]
    size = lambda found: sum(m.weight.numel() for m in found)  # noqa: E731
    rows = lambda found: sum(m.weight.shape[0] for m in found)  # noqa: E731
    return Weights(
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=size(inside),
        block_rows=rows(inside),
        trunk=size(trunk),
        trunk_rows=rows(trunk),
        head=size(head),
        head_rows=rows(head),
        tables=size(tables),
        table_rows=rows(tables),
        tied=any(id(m.weight) in shared for m in linears),
        groups=all(m.in_features % 32 == 0 for m in inside),
    )


def on_meta(task: Task, config: Any) -> PreTrainedModel:
    """Build without memory."""
    with torch.device("meta"):
        return task.build(config)


@dataclass(frozen=True)
class Student:
    """A student that can be cut out of the teacher.

    Attributes:
        sizes: as `Shrunk` takes them.
        config: of transformers.
        weights: counted.
        shape: for operations.
        share: of the teacher's parameters.
    """

    sizes: Sizes
    config: Any
    weights: Weights
    shape: Shape
    share: float


def cuttable(model: PreTrainedModel) -> str | None:
    """Why nothing can be cut out of a model; None where it can."""
    try:
        family_of(model)
    except ConfigError as error:
        return str(error)
    return None


def narrower(model: PreTrainedModel, task: Task) -> Iterator[Student]:
    """Students of the teacher's depth by falling width, 15/16 to 4/16; then, at that width, of ever fewer layers.

    Widths before layers, as language models of this size lose less so (Minitron, arXiv 2407.14679, section 4). Each has strictly fewer
    parameters than the one before.
    """
    whole, found = sizes_of(model), None
    tried = list(dict.fromkeys(_scaled(model, part / PARTS) for part in range(PARTS - 1, NARROWEST - 1, -1)))
    least = model.num_parameters()
    for sizes in tried:
        if sizes == whole or not _loads(model, sizes):
            continue
        student = _student(model, task, sizes)
        if student.weights.parameters < least:
            found, least = student, student.weights.parameters
            yield student
    yield from fewer_layers(model, task, whole if found is None else found.sizes)


def fewer_layers(model: PreTrainedModel, task: Task, start: Sizes | None = None) -> Iterator[Student]:
    """Students of ever fewer layers, of a deep model in larger steps.

    Args:
        model: the teacher, on `meta`.
        task: what it is for.
        start: the other sizes; None for the teacher's.
    """
    start = start or sizes_of(model)
    step = max(1, start.layers // MOST)
    for layers in range(start.layers - step, 0, -step):
        yield _student(model, task, replace(start, layers=layers))


def half_of_the_neurons(model: PreTrainedModel, task: Task, layers: int | None = None) -> Student:
    """The teacher with half of each feed-forward network, and as many layers."""
    whole = sizes_of(model)
    return _student(model, task, replace(whole, intermediate=whole.intermediate // 2, layers=layers or whole.layers))


def _student(model: PreTrainedModel, task: Task, sizes: Sizes) -> Student:
    config = smaller_config(model.config, sizes, list(range(sizes.layers)), head_dim(model))
    built = on_meta(task, config)
    weights = weights_of(built)
    return Student(sizes, config, weights, shape_of(built, "--teacher"), weights.parameters / model.num_parameters())


def _scaled(model: PreTrainedModel, factor: float) -> Sizes:
    """One factor for hidden size, feed-forward network and groups.

    Multiples of 64 of a wide model, else of 32, so that groups of 4-bit weights fill rows; of 8 where the whole is no multiple itself.
    """
    whole, family = sizes_of(model), family_of(model)
    groups = max(1, round(factor * whole.groups))
    heads = groups * (whole.heads // whole.groups)
    step = 64 if whole.hidden % 64 == 0 and whole.hidden >= 1024 else 32 if whole.hidden % 32 == 0 else 8
    near = lambda value, unit: max(1, round(value / unit)) * unit  # noqa: E731
    hidden = near(factor * whole.hidden, math.lcm(step, heads)) if family.head_dim else heads * head_dim(model)
    inner = near(factor * whole.intermediate, step)
    return Sizes(whole.layers, min(hidden, whole.hidden), min(inner, whole.intermediate), heads, groups)


def _loads(model: PreTrainedModel, sizes: Sizes) -> bool:
    try:
        smaller_config(model.config, sizes, list(range(sizes.layers)), head_dim(model))
    except ConfigError:
        return False
    return True
