"""What is looked at in a model before it is trained or asked: all of it would otherwise be silently wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.tasks import Task, unwrap
from distill.types import ConfigError


@torch.no_grad()
def check_head(task: Task, model: nn.Module, who: str) -> None:
    """Compare our lazily applied head with the logits of the model's own forward pass on eight tokens.

    Raises:
        ConfigError: they differ, so the architecture does something to its logits that we do not know: training would be silently wrong.
    """
    inputs = {"input_ids": _eight_tokens(model)[None]}
    with evaluating(model):
        out = task.outputs(model, inputs)
        ours = out.head(out.features).float()
        theirs = model(**inputs).logits.float().view_as(ours)
    gap = (ours - theirs).abs().max().item()
    if not gap <= _rounding(model) * theirs.abs().max().item():
        raise ConfigError(
            f"{who}: {type(unwrap(model)).__name__} computes its logits in a way that is not known here (largest difference {gap:.3g}); "
            "its head cannot be applied chunk by chunk"
        )


@torch.no_grad()
def check_packing(task: Task, model: nn.Module, who: str) -> None:
    """Change one of two packed documents and make sure that the features of the other stay.

    Two rows of two documents of four tokens: some attention kernels keep documents apart in a single row only.

    Args:
        task: how to run the model.
        model: the model.
        who: key of the model, for the message.

    Raises:
        ConfigError: they change, or the model takes no `position_ids`, which are all that tells documents apart.
    """
    first = _eight_tokens(model)
    other = torch.cat([first[:4].roll(1), first[4:]])
    positions = torch.arange(4, device=first.device).repeat(2).expand(2, 8)
    refusal = ConfigError(
        f"{who}: documents packed into one window would see each other in {type(unwrap(model)).__name__}; set data.pack: false"
    )
    with evaluating(model):
        try:
            alone, beside = (
                task.outputs(model, {"input_ids": ids.expand(2, 8), "position_ids": positions}).features[:, 4:].float()
                for ids in (first, other)
            )
        except TypeError as error:
            raise refusal from error
    if not (alone - beside).abs().max() <= _rounding(model) * alone.abs().max():
        raise refusal


def check_length(model: nn.Module, max_length: int, who: str) -> None:
    """Make sure that a model has a position for every token of the longest sequence, where its config says how many it has.

    Args:
        model: the model.
        max_length: tokens in the longest sequence.
        who: key of the model, for the message.

    Raises:
        ConfigError: it has fewer.
    """
    positions = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)  # by its name in any architecture
    if not isinstance(positions, int):
        return
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its kin count from there
    if positions < max_length:
        raise ConfigError(f"{who} has positions for {positions} tokens, but data.max_length is {max_length}; lower it to {positions}")


def set_padding(model: nn.Module, expected: dict[str, Any]) -> None:
    """Tell a model the data's padding token where it knows none; a classifier always: decoders read the class at the last real token.

    Args:
        model: the model.
        expected: what its config must say for these data; nothing is done without `pad_token_id`.
    """
    config = unwrap(model).config.get_text_config()
    if "pad_token_id" in expected and ("num_labels" in expected or config.pad_token_id is None):
        config.pad_token_id = expected["pad_token_id"]


def check_classes(model: nn.Module, expected: dict[str, Any], who: str) -> None:
    """Make sure that a model's head predicts the classes of the data: the same labels in the same order, or room for every token.

    Args:
        model: the model.
        expected: what its config must say for these data: `vocab_size`, or `num_labels` and `label2id`.
        who: key of the model, for the message.

    Raises:
        ConfigError: it does not.
    """
    config = unwrap(model).config
    if "num_labels" not in expected:
        rows = config.get_text_config().vocab_size
        if rows < expected["vocab_size"]:
            raise ConfigError(f"{who} has {rows} rows for {expected['vocab_size']} tokens; its embeddings must be resized")
        return
    if config.num_labels != expected["num_labels"]:
        raise ConfigError(f"{who} has {config.num_labels} labels, but the data have {expected['num_labels']}; take a model of these labels")
    check_order(config, expected, who, only_same_names=not (_named(expected["id2label"]) and _named(config.id2label)))


def check_order(config: Any, expected: dict[str, Any], who: str, only_same_names: bool = False) -> None:
    """Make sure that a model's config names the classes in the order of the data.

    Args:
        config: the model's.
        expected: holds `id2label` of the data.
        who: key of the model, for the message.
        only_same_names: let a config pass whose names are not those of the data at all.

    Raises:
        ConfigError: a class has another name; the message shows the first.
    """
    theirs, ours = config.id2label, expected["id2label"]
    if only_same_names and set(theirs.values()) != set(ours.values()):
        return
    for i, name in sorted(ours.items()):
        if theirs.get(i) != name:
            raise ConfigError(
                f"{who} calls class {i} '{theirs.get(i)}', but the data call it '{name}'; set data.labels to the model's order"
            )


def _named(names: dict[int, str]) -> bool:
    """Whether somebody named the classes: a column of integers gives `0`, `1`, …, transformers writes `LABEL_0`, `LABEL_1`, …"""
    return not any(all(name == form.format(i) for i, name in names.items()) for form in ("{}", "LABEL_{}"))


def _eight_tokens(model: nn.Module) -> Tensor:
    ids = torch.arange(1, 9, device=next(model.parameters()).device)
    return ids % unwrap(model).get_input_embeddings().num_embeddings


def _rounding(model: nn.Module) -> float:
    return 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 2e-2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the context is open."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
