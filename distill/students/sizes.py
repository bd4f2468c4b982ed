"""How large a student cut from another model is to be: from what was asked to numbers that a config can hold."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from distill.compress.families import family_of
from distill.compress.structured import head_dim
from distill.compress.width import TYPES
from distill.tasks import Task
from distill.types import ConfigError

STEPS = 64  # factors that a target tries


@dataclass(frozen=True)
class Sizes:
    """What a config says of a model's size; in the words of transformers.

    Attributes:
        layers: `num_hidden_layers`.
        hidden: `hidden_size`.
        intermediate: `intermediate_size`.
        heads: `num_attention_heads`.
        groups: `num_key_value_heads`; the heads where there are none.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int


def share(value: float | str, key: str) -> float:
    """Read a share of the parameters: 0.4, or "40 %".

    Raises:
        ConfigError: it is no number, or not in (0, 1].
    """
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise ConfigError(f"{key} must be a share of the parameters above 0 and at most 1, e.g. 0.4 or 40 %, got '{value}'")
    return number


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Read what a model's config says."""
    config = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads  # BERT's config has none
    return Sizes(config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads, groups)


def asked(model: PreTrainedModel, layers: int | None, given: dict[str, int | None]) -> Sizes:
    """Complete what was given: what was not stays as it is, or follows.

    Queries follow the groups, at as many a group as before, and groups follow queries where there is one query a group. In an encoder of
    BERT's family the width of a head is `hidden_size / num_attention_heads`, so each of the two follows the other.

    Args:
        model: to be cut.
        layers: how many stay; None for all.
        given: the keys of `Sizes` but for the layers, None where not given.

    Raises:
        ConfigError: more than there is, or numbers that do not go together.
    """
    before, key = sizes_of(model), "model.student"
    found = {name: value for name, value in given.items() if value is not None} | ({} if layers is None else {"layers": layers})
    for name, value in found.items():
        if not 1 <= value <= getattr(before, name):
            raise ConfigError(f"{key}: {name} must be 1 to {getattr(before, name)}, as the model has, got {value}")
    size = before.heads // before.groups
    if "heads" not in found and "groups" in found:
        found["heads"] = found["groups"] * size
    if "groups" not in found and "heads" in found and size == 1:
        found["groups"] = found["heads"]
    if not family_of(model).head_dim:
        found = _encoder(found, head_dim(model))
    after = replace(before, **found)
    if after.heads % after.groups or after.heads // after.groups > size:
        raise ConfigError(
            f"{key}: {after.heads} num_attention_heads in {after.groups} num_key_value_heads; every group keeps as many, at most {size}: "
            f"take a multiple of {after.groups}, at most {after.groups * size}"
        )
    return after


def _encoder(found: dict[str, int], width: int) -> dict[str, int]:
    hidden, heads = found.get("hidden"), found.get("heads")
    if hidden is None and heads is None:
        return found
    heads = hidden // width if heads is None and hidden is not None else heads
    assert heads is not None
    if hidden is not None and hidden != heads * width:
        raise ConfigError(
            f"model.student: hidden_size {hidden} and {heads} heads; in this family the hidden size is the heads times their width of "
            f"{width}: take hidden_size {max(1, hidden // width) * width} or {-(-hidden // width) * width}, or num_attention_heads alone"
        )
    return found | {"hidden": heads * width, "heads": heads, "groups": heads}


def smaller_config(config: Any, sizes: Sizes, kept: list[int], head: int) -> Any:
    """Give a copy of a config with other sizes.

    Args:
        config: of transformers, of a known family.
        sizes: what it is to say.
        kept: the layers that stay, for architectures whose layers differ.
        head: width of a head.

    Raises:
        ConfigError: transformers takes no such config.
    """
    values = copy.deepcopy(config.to_dict())
    values |= {"num_hidden_layers": sizes.layers, "hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate}
    values |= {"num_attention_heads": sizes.heads}
    if "num_key_value_heads" in values:
        values |= {"num_key_value_heads": sizes.groups, "head_dim": head}
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][i] for i in kept]
    try:
        made = type(config).from_dict(values)
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"model.student: transformers takes no such model: {' '.join(str(error).split())[:300]}") from error
    made._attn_implementation = config._attn_implementation
    return made


def fitted(model: PreTrainedModel, task: Task, start: Sizes, fixed: set[str], target: float, by: Literal["width", "depth"]) -> Sizes:
    """Find the largest model with at most `target` of the parameters.

    By depth: the most layers that fit. By width: one factor f of 1/64 … 64/64 for hidden size, feed-forward width and groups of attention
    heads alike, each rounded to the nearest that goes: a multiple of 8 for the first two, of the number of heads as well for the hidden
    size, for which configs ask; an encoder of BERT's family has the hidden size of its heads. Of all that fit, the one with most
    parameters; what rounding has left over goes to the feed-forward width. What transformers takes no config of is no choice, and a hidden
    size that cannot be cut, see `width.TYPES`, stays.

    Args:
        model: to be cut.
        task: what it is for.
        start: the sizes from which to shrink.
        fixed: names of `Sizes` that stay.
        target: share of the model's parameters.
        by: what is cut.

    Raises:
        ConfigError: not even the smallest fits.
    """
    if by == "depth":
        choices = {replace(start, layers=n) for n in range(1, start.layers + 1)}
    else:
        choices = {_scaled(model, start, fixed, k / STEPS) for k in range(1, STEPS + 1)}
    counts = _counts(model, task, choices)
    whole = model.num_parameters()
    fits = [choice for choice in counts if counts[choice] <= target * whole]
    if not fits:
        raise ConfigError(
            f"model.student.target: cutting by {by} reaches {min(counts.values()) / whole:.1%} of the parameters at the least, not "
            f"{target:.1%}; " + ("take target_by: width" if by == "depth" else "leave fewer sizes fixed, or cut layers as well")
        )
    best = max(fits, key=lambda choice: (counts[choice], choice.hidden, choice.groups))
    if by == "depth" or "intermediate" in fixed:
        return best
    wider = replace(best, intermediate=best.intermediate + 8)
    more = int((target * whole - counts[best]) / (count(model, task, wider) - counts[best]))
    return replace(best, intermediate=min(start.intermediate, best.intermediate + 8 * more))


def _counts(model: PreTrainedModel, task: Task, choices: Iterable[Sizes]) -> dict[Sizes, int]:
    """The parameters of each choice that transformers takes."""
    found: dict[Sizes, int] = {}
    for choice in choices:
        try:
            found[choice] = count(model, task, choice)
        except ConfigError as error:
            refused = error
    if not found:
        raise refused
    return found


def _scaled(model: PreTrainedModel, start: Sizes, fixed: set[str], factor: float) -> Sizes:
    if model.config.model_type not in TYPES:
        fixed = fixed | ({"hidden"} if family_of(model).head_dim else {"hidden", "heads"})
    groups = start.groups if fixed & {"heads", "groups"} else max(1, round(factor * start.groups))
    heads = groups * (start.heads // start.groups)
    hidden = start.hidden
    if not family_of(model).head_dim:
        hidden = heads * head_dim(model)
    elif "hidden" not in fixed:
        hidden = _nearest(factor * start.hidden, math.lcm(8, heads), start.hidden)
    inner = start.intermediate if "intermediate" in fixed else _nearest(factor * start.intermediate, 8, start.intermediate)
    return Sizes(start.layers, hidden, inner, heads, groups)


def _nearest(value: float, step: int, most: int) -> int:
    """The nearest multiple of a step, at least one; the whole where that is nearer, whatever it is a multiple of."""
    multiple = max(1, round(value / step)) * step
    return most if multiple > most or most - value < abs(multiple - value) else multiple


def count(model: PreTrainedModel, task: Task, sizes: Sizes) -> int:
    """Count the parameters of a model cut to these sizes, without making it: those of one layer, and as many again for each more."""
    one, two = (_count(model, task, replace(sizes, layers=layers)) for layers in (1, 2))
    return one + (sizes.layers - 1) * (two - one)


def _count(model: PreTrainedModel, task: Task, sizes: Sizes) -> int:
    config = smaller_config(model.config, sizes, [0] * sizes.layers, head_dim(model))
    with torch.device("meta"):
        return sum(p.numel() for p in task.build(config).parameters())
