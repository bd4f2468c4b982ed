"""Tasks: what a batch is, what the head predicts, which metric counts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
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
            taps: which activations are wanted, by the names of `record`.
        """

    @abstractmethod
    def head(self, model: nn.Module) -> nn.Module:
        """Give what maps the features of `outputs` to logits."""


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
        return Outputs(features, self.head(causal_lm), seen)

    def head(self, model: nn.Module) -> nn.Module:
        """Give the output embedding with its logit transforms."""
        causal_lm = unwrap(model)
        return LogitHead(causal_lm.get_output_embeddings(), causal_lm.config)


class SequenceClassification(Task):
    """Predict one class per sequence. `labels` is `[B, 1]`; the features are the logits themselves, so every architecture works."""

    auto_class = AutoModelForSequenceClassification
    unit = "sample"

    def outputs(self, model: nn.Module, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the whole model: V is small, so its logits `[B, 1, V]` are the features of an identity head."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        with record(unwrap(model), taps) as seen:
            logits = model(**inputs).logits
        return Outputs(logits[:, None], self.head(model), seen)

    def head(self, model: nn.Module) -> nn.Module:
        """Give the identity: the features are the logits."""
        return nn.Identity()


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


@contextmanager
def record(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect activations of submodules while the context is open.

    Args:
        model: of transformers.
        names: dotted name of a submodule for its output (the first item of a tuple); with `:input` for its first input; with `:1` for
            the item of that index, e.g. the attention probabilities of an attention.

    Raises:
        ConfigError: no such submodule, or (when the model runs) no tensor there.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:
            handles.append(_tap(model, name, seen))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tap(model: nn.Module, name: str, seen: dict[str, Tensor]) -> RemovableHandle:
    path, _, which = name.partition(":")
    module = submodule(model, path)

    def keep(value: Any) -> None:
        if not isinstance(value, Tensor):
            raise ConfigError(f"tap '{name}': there is no tensor but {type(value).__name__}")
        seen[name] = value

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs.get("hidden_states"))

    def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(output[int(which or 0)] if isinstance(output, tuple) else output)

    if which == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    if which and not which.isdecimal():
        raise ConfigError(f"tap '{name}': after the colon comes `input` or the index of an output, got '{which}'")
    return module.register_forward_hook(on_output)


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
