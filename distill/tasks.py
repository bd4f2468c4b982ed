"""Tasks: what a batch is, what the head predicts, which metric counts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from distill import hub
from distill.types import Batch, ConfigError, Outputs


class Task(ABC):
    """How a model of transformers is loaded, run, and measured for one kind of prediction."""

    auto_class: ClassVar[Any]
    unit: ClassVar[str]  # what one valid position is, in the singular

    def load(self, name: str, key: str, **kwargs: Any) -> Any:
        """Load a model (with `output_loading_info`, also what was missing) from a folder or the hub; `key` is named in errors."""
        return hub.load(self.auto_class, name, key, **kwargs)

    def build(self, config: Any, **kwargs: Any) -> PreTrainedModel:
        """Make a randomly initialised model from its configuration."""
        return self.auto_class.from_config(config, **kwargs)

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the model up to its head.

        Args:
            model: a model of this task, possibly wrapped by peft.
            batch: what the data module gives; `labels` is `[B, T]`, the class that each position predicts.
            taps: dotted names of submodules whose output is wanted.
        """


class CausalLM(Task):
    """Predict the next token. `labels[b, t]` is the token after position t (already shifted), or −100."""

    auto_class = AutoModelForCausalLM
    unit = "token"

    def outputs(self, model: nn.Module, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the trunk; the head is the output embedding with the logit transforms of the model's config."""
        causal_lm = unwrap(model)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        with record(causal_lm, taps) as seen:
            # use_cache=False: a cache costs memory, and lets packed documents see each other
            features = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
        return Outputs(features, LogitHead(causal_lm.get_output_embeddings(), causal_lm.config), seen)


class SequenceClassification(Task):
    """Predict one class per sequence. `labels` is `[B, 1]`; the features are the logits themselves, so every architecture works."""

    auto_class = AutoModelForSequenceClassification
    unit = "sample"

    def outputs(self, model: nn.Module, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the whole model: V is small, so its logits `[B, 1, V]` are the features of an identity head."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        with record(unwrap(model), taps) as seen:
            logits = model(**inputs).logits
        return Outputs(logits[:, None], nn.Identity(), seen)


class LogitHead(nn.Module):
    """The output embedding followed by the logit transforms that architectures name in their config.

    Scales: `logit_scale` (Cohere, ×), `lm_head_multiplier` (Falcon-H1, ×), `logits_scaling` (Granite, ÷);
    then `final_logit_softcapping` (Gemma: `c · tanh(x / c)`). `check_head` compares the result with the model's own.
    """

    def __init__(self, projection: nn.Module, config: Any) -> None:
        super().__init__()
        self.projection = projection
        text = config.get_text_config()
        self.scale = (
            float(getattr(text, "logit_scale", None) or 1.0)
            * float(getattr(text, "lm_head_multiplier", None) or 1.0)
            / float(getattr(text, "logits_scaling", None) or 1.0)
        )
        self.cap: float | None = getattr(text, "final_logit_softcapping", None)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[..., D]` to logits `[..., V]`."""
        logits = self.projection(features)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


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


@contextmanager
def record(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of submodules, by dotted name, while the context is open (the first item of a tuple)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    try:
        for name in names:
            handles.append(submodule(model, name).register_forward_hook(keep(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Find a submodule by its dotted name.

    Raises:
        ConfigError: there is none; the message lists the names at the level where the path breaks.
    """
    here = model
    for i, part in enumerate(name.split(".")):
        children = dict(here.named_children())
        if part not in children:
            where = ".".join(name.split(".")[:i]) or type(model).__name__
            raise ConfigError(f"tap '{name}': {where} has no '{part}'; it has {', '.join(children) or 'no submodules'}")
        here = children[part]
    return here


def unwrap(model: nn.Module) -> Any:
    """Give the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
