"""How layers can be quantised, by short names, and what is wrong with a choice."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from distill.lookup import did_you_mean
from distill.types import ConfigError


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a layer is quantised.

    Attributes:
        kind: `int`, `ternary` or `fp8` weights.
        bits: of a weight; a ternary one is stored in 2.
        group_size: weights of a row that share a scale; None for the whole row (`ternary`: the whole weight).
        inputs: whether the layer's input is quantised too, to 8 bits for each token when it comes.
    """

    kind: Literal["int", "ternary", "fp8"]
    bits: int
    group_size: int | None
    inputs: bool = False


SCHEMES = {
    "int8": Scheme("int", 8, None, inputs=True),
    "int8-int4": Scheme("int", 4, 32, inputs=True),
    "int4": Scheme("int", 4, 32),
    "int3": Scheme("int", 3, 32),
    "int2": Scheme("int", 2, 32),
    "ternary": Scheme("ternary", 2, None),
    "fp8": Scheme("fp8", 8, None, inputs=True),
}


def scheme(name: str, group_size: int | Literal["row"] | None, key: str) -> Scheme:
    """Find a scheme by its short name.

    Args:
        name: of `SCHEMES`.
        group_size: weights that share a scale; `row` for a scale a row, None for the scheme's own.
        key: of the configuration, for messages.

    Raises:
        ConfigError: no such scheme, a size below 2, or one for a scheme that has none.
    """
    if name not in SCHEMES:
        raise ConfigError(f"{key}.scheme: there is no '{name}'{did_you_mean(name, list(SCHEMES))}; there are {', '.join(SCHEMES)}")
    found = SCHEMES[name]
    if group_size is None:
        return found
    if isinstance(group_size, int) and group_size < 2:
        raise ConfigError(f"{key}.group_size must be at least 2, got {group_size}; 'row' gives each row one scale")
    if found.kind == "fp8" or (found.kind == "ternary" and group_size == "row"):
        raise ConfigError(f"{key}.group_size is {group_size}, but {name} does without; leave it out")
    return replace(found, group_size=None if group_size == "row" else group_size)


def check_machine(schemes: Mapping[str, Scheme], key: str) -> None:
    """Refuse what this machine has no kernels for.

    Raises:
        ConfigError: fp8 without a GPU that multiplies it.
    """
    if not any(each.kind == "fp8" for each in schemes.values()):
        return
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found < (8, 9):
        here = "there is no GPU" if found is None else f"this one has {found[0]}.{found[1]}"
        raise ConfigError(f"{key}.scheme: fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), and {here}; take int8")


def check_groups(layers: Mapping[str, nn.Linear], schemes: Mapping[str, Scheme], key: str) -> None:
    """Refuse groups that do not fill a layer's rows.

    Raises:
        ConfigError: one does not; the message names the layer and sizes that do.
    """
    for name, layer in layers.items():
        size = schemes[name].group_size
        if size is not None and layer.in_features % size:
            fitting = [n for n in range(2, size) if all(other.in_features % n == 0 for other in layers.values())]
            fix = f"set group_size: {fitting[-1]}, which divides all" if fitting else "set group_size: row"
            raise ConfigError(
                f"{key}.group_size is {size}, which does not divide the {layer.in_features} inputs of '{name}'; {fix}, or exclude the layer"
            )
