"""Which layers a compression is for: the linear layers of a model, by patterns of their names."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from distill.lookup import did_you_mean
from distill.types import ConfigError


def linears(model: PreTrainedModel, include: Sequence[str] | None, exclude: Sequence[str] | None, key: str) -> dict[str, nn.Linear]:
    """Choose linear layers by name, in the model's order.

    Args:
        model: whose layers; some may be parametrised already.
        include: patterns of `fnmatch` on dotted names, e.g. `*.mlp.*`; None for all but the head, which is what lies outside
            `model.base_model` (the output embedding, a classifier's last layers).
        exclude: patterns of those that are left out again; None for none.
        key: of the configuration, for messages, e.g. `trainer.callbacks: Pruning`.

    Returns:
        The layers by dotted name; at least one.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left, a layer shares its weight with another module, or, without `include`,
            most of the trunk is in parameters of no linear layer (fused experts), so that little would be compressed.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ConfigError(f"{key}.{option}: no linear layer is called '{pattern}'{_near(pattern, list(found))}")
    outside = set() if include is not None else set(found) - _trunk(model)
    chosen = {
        name: module
        for name, module in found.items()
        if name not in outside
        and (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not chosen:
        raise ConfigError(f"{key}: {type(model).__name__} has no linear layer to compress{_left(list(found), include, exclude)}")
    _refuse_tied(model, list(chosen), key)
    if include is None:
        _refuse_fused(model, {name: module for name, module in found.items() if name not in outside}, key)
    return chosen


def _trunk(model: PreTrainedModel) -> set[str]:
    """Names of what lies inside the base model, less an output embedding there."""
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if module is not head and (not prefix or name.startswith(f"{prefix}."))}


def _refuse_fused(model: PreTrainedModel, found: dict[str, nn.Linear], key: str) -> None:
    """Experts of a mixture are parameters `[experts, out, in]` in transformers 5."""
    fused = {name: parameter.numel() for name, parameter in model.base_model.named_parameters() if parameter.ndim >= 3}
    linear = sum(module.in_features * module.out_features for module in found.values())
    if not fused:
        return
    said = f"{sum(fused.values()):,} parameters, e.g. '{next(iter(fused))}', are fused over experts and in no linear layer"
    if sum(fused.values()) > linear:
        raise ConfigError(
            f"{key}: {said}, so that only the {linear:,} of its linear layers would be compressed; take a dense student, or say with "
            "include that these alone are meant"
        )
    warnings.warn(f"{key}: {said}: they stay as they are", stacklevel=3)


def _refuse_tied(model: PreTrainedModel, names: list[str], key: str) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in names:
        if any(uses[id(parameter)] > 1 for parameter in model.get_submodule(name).parameters()):
            raise ConfigError(
                f"{key}: the weight of '{name}' is shared with another module (as a tied embedding is), which would be compressed with it; "
                f"exclude '{name}', or set tie_word_embeddings: false in the student's config"
            )


def _near(pattern: str, names: list[str]) -> str:
    kinds = _kinds(names)
    parts = {part for kind in kinds for part in kind.split(".") if part != "*"}
    bare = pattern.replace("*", "").strip(".")
    return f"{did_you_mean(bare, [*kinds, *sorted(parts)])}; there are {', '.join(kinds) or 'none'}"


def _kinds(names: list[str]) -> list[str]:
    """The names with the numbers of layers as stars, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _left(names: list[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> str:
    if not names:
        return ": its layers are of other classes, e.g. the transposed ones of GPT-2"
    chosen = "include leaves out its head" if include is None else f"include is {list(include)}"
    return f": {chosen}, exclude is {list(exclude or ())}, and there are {', '.join(_kinds(names))}"
