"""The online teacher: a frozen model in memory that runs on every batch."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.strategies import Strategy
from torch import nn
from transformers import PreTrainedModel

from distill import hub
from distill.checks import check_classes, check_head, set_padding
from distill.parallel.same import check_same
from distill.parallel.sharded import sharded
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.offload import Visits
from distill.teachers.quantise import quantise
from distill.teachers.rows import in_parts
from distill.types import Batch, ConfigError, Outputs


class OnlineTeacher(Teacher):
    """A frozen model: `eval`, no gradient, no cache; outside the module tree.

    Args:
        model: a folder or a hub id.
        revision: of the hub id.
        dtype: what it runs in; `auto` follows the trainer's precision.
        attn_implementation: as in transformers, e.g. `sdpa`, `flash_attention_2`.
        quantize: `int8` or `int4` stores the weights in as few bits, see `quantise`; slower on most machines, for a teacher that does not
            fit otherwise.
        sharded: leave each rank its part of the weights, gathered layer by layer while it runs, see `parallel.sharded`; wants DeepSpeed.
        recipe: a config that trains `model` when its folder does not exist yet (see `configs/`).
        compile: compile all but the head, with `torch.compile`; the first steps wait for it, and no term may look at activations.
        offload: keep the weights, all but the head's, on the CPU, and copy them to the device each time they are used, see `Visits`.
        micro_batch: rows that the teacher takes at a time, where its activations want more memory than the student's; None for all.

    Raises:
        ConfigError: two options exclude each other, or a number is out of range.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        sharded: bool = False,
        recipe: str | None = None,
        compile: bool = False,  # the name that torch has for it
        offload: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        _check_options(sharded, {"quantize": quantize, "offload": offload, "compile": compile, "micro_batch": micro_batch})
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"model.teacher.micro_batch must be at least 1, got {micro_batch}; leave it out to take all rows at once")
        self.name, self.revision, self.recipe, self.sharded = model, revision, recipe, sharded
        self.compile, self.offload, self.micro_batch = compile, offload, micro_batch
        self.visits: Visits | None = None
        self.described: dict[str, Any] = {}
        self.is_spread = False
        self.dtype, self.attn_implementation, self.quantize = dtype, attn_implementation, quantize
        self.model: PreTrainedModel | None = None
        self.checked: tuple[Any, dict[str, Any]] | None = None  # the tokenizer and the configuration that passed

    def recipe_needed(self) -> str | None:
        """Give the recipe while the teacher's folder does not exist."""
        return self.recipe if self.recipe and not Path(self.name).is_dir() else None

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Load, freeze, move."""
        if self.model is None:
            kwargs: dict[str, Any] = {"dtype": dtype if self.dtype == "auto" else getattr(torch, self.dtype), "revision": self.revision}
            if self.attn_implementation:
                kwargs["attn_implementation"] = self.attn_implementation
            model, found = task.load(self.name, "model.teacher.model", output_loading_info=True, **kwargs)
            if missing := sorted(found["missing_keys"]):
                raise ConfigError(
                    f"model.teacher.model: '{self.name}' has no weights for {', '.join(missing[:3])}, so its head would be random; "
                    "take a model that was trained for this task"
                )
            model.requires_grad_(False).eval()
            if self.quantize:
                quantise(model, self.quantize)  # before the move: the device never holds the whole weights
            if self.offload:
                self.visits = Visits(model, task.head(model), device)
            elif not self.sharded:  # the device may have no room for it whole
                model.to(device)
            check_head(task, model, "model.teacher")  # on the device: there are kernels that run nowhere else
            if self.compile:
                model.base_model.compile()
            self.task, self.model, self.described = task, model, hub.describe(model)
        elif not self.sharded and not self.offload:
            self.model.to(device)

    def spread(self, strategy: Strategy) -> None:
        """Compare, and shard, the first time."""
        assert self.model is not None, "setup comes first"
        if self.is_spread:
            return
        with self.visits or nullcontext():  # all in one place
            check_same(self.model, "model.teacher", strategy.root_device)
        if self.sharded:
            sharded(self.model, strategy)
        self.is_spread = True

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Compare the tokenizer in the teacher's folder, token by token, and for a classifier its labels; once for the same data."""
        assert self.model is not None, "setup comes first"
        if self.checked == (tokenizer, expected):
            return
        hub.check_tokenizer(self.name, "model.teacher.model", self.revision, tokenizer)
        check_classes(self.model, expected, "model.teacher")
        set_padding(self.model, expected)
        self.checked = (tokenizer, expected)

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the frozen model.

        Raises:
            ConfigError: it is compiled, and activations are wanted.
        """
        assert self.model is not None, "setup comes first"
        wanted = list(taps)
        if wanted and self.compile:
            raise ConfigError(
                f"model.losses: a term compares activations ({', '.join(wanted[:3])}), which a compiled teacher does not show; set "
                "model.teacher.compile: false"
            )
        run = partial(self.task.outputs, self.model)
        return run(batch, wanted) if self.micro_batch is None else in_parts(run, batch, wanted, self.micro_batch)

    def describe(self) -> dict[str, Any]:
        """Give what was counted when it was whole."""
        assert self.model is not None, "setup comes first"
        return self.described

    def models(self) -> list[nn.Module]:
        """The one model."""
        return [] if self.model is None else [self.model]


_WITHOUT_SHARDED = {
    "quantize": "sharded alone saves more, the more ranks there are",
    "offload": "sharded weights are gathered from the other ranks' devices; take one",
    "compile": "compiled code gathers no weights; take one",
    "micro_batch": "all ranks must run a sharded teacher equally often, and the last rows of validation may be fewer on some",
}


def _check_options(sharded: bool, chosen: Mapping[str, object]) -> None:
    for name, why in _WITHOUT_SHARDED.items():
        if sharded and chosen[name]:
            raise ConfigError(f"model.teacher: {name} and sharded cannot be had together; {why}")
    if chosen["offload"] and chosen["compile"]:
        raise ConfigError(
            "model.teacher: compile and offload cannot be had together; an offloaded teacher waits for its weights, which compiling does "
            "not shorten"
        )
