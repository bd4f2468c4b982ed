"""Quantisation-aware training: the student computes with the weights (and inputs) that it will have when it is deployed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from itertools import count
from typing import Any, Literal

import pytorch_lightning as pl
from torch import nn
from transformers import PreTrainedModel

from distill.callbacks.alone import costs_alone
from distill.compress import fake_quant, integers, schemes, sensitivity
from distill.compress.base import Compression
from distill.compress.fake_quant import stored
from distill.compress.schemes import Scheme
from distill.compress.select import linears
from distill.parallel.gradients import shards_parameters
from distill.tasks import Task
from distill.types import ConfigError

KEY = "trainer.callbacks: QuantizationAwareTraining"


class QuantizationAwareTraining(Compression):
    """Trains the linear layers of the student as they will be quantised; the head and embeddings stay as they are.

    In step t the layers compute with `w + λ (q(w) − w)`, where `λ = clip((t − start) / warmup, 0, 1)`, and with q(w) whenever they are
    evaluated: a validation loss is that of the student that would be saved. So is its weight: the saved student holds q(w), its
    config says how each layer is quantised (`distill_quantization`), and exports read integers and scales back to the bit.

    Args:
        scheme: `int8` (8-bit weights, a scale a row, and 8-bit inputs, a scale and zero point a token), `int8-int4` (4-bit weights in
            groups, 8-bit inputs), `int4`, `int3`, `int2` (weights alone, in groups), `ternary` (BitNet b1.58: −γ, 0, γ), `fp8` (both, on
            GPUs that multiply it).
        group_size: weights of a row that share a scale; `row` for one scale a row; None for the scheme's own: 32 for groups, a row for
            `int8`, the whole weight for `ternary`.
        include: patterns of layers' names, e.g. `*.mlp.*`; None for all linear layers but the head.
        exclude: patterns of layers that stay as they are.
        start: when λ leaves 0: a step, or below 1 a share of all steps.
        warmup: how long λ takes to 1: steps, or below 1 a share of all; 0 for at once.
        bits: of the layers that a pattern matches, 2 to 8, in place of the scheme's; the first pattern that matches counts.
        budget: bits a weight on average; each layer's are chosen by what quantising it alone costs the student as training begins, and a
            checkpoint brings those that it was trained with.
        choices: numbers of bits to choose from under a budget.
        calibration: training rows that this cost is measured on.

    Raises:
        ConfigError: no such scheme, a number out of range, options that exclude each other.
    """

    _owners = count()

    def __init__(
        self,
        scheme: str = "int4",
        group_size: int | Literal["row"] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        start: float = 0.0,
        warmup: float = 0.0,
        bits: dict[str, int] | None = None,
        budget: float | None = None,
        choices: Sequence[int] = (2, 3, 4, 8),
        calibration: int = 16,
    ) -> None:
        self.scheme, self.base = scheme, schemes.scheme(scheme, group_size, KEY)
        self.include, self.exclude, self.start, self.warmup = include, exclude, start, warmup
        self.bits, self.budget, self.choices, self.calibration = bits or {}, budget, sorted(set(choices)), calibration
        self.schemes: dict[str, Scheme] = {}  # of the layers, once there is a student
        self.costs: dict[str, dict[int, float]] = {}  # of each layer alone, nats, where a budget is given
        self.owner = next(self._owners)  # by which it finds its fake quantisers in any copy of the student
        self._sizes: dict[str, int] = {}
        self._check()

    def _check(self) -> None:
        for name, value in (("start", self.start), ("warmup", self.warmup)):
            if value < 0:
                raise ConfigError(f"{KEY}.{name} must be at least 0, got {value:g}; below 1 it is a share of the steps, else a step")
        if (self.bits or self.budget is not None) and self.base.kind != "int":
            raise ConfigError(f"{KEY}: bits and budget are for schemes of integers, not for {self.scheme}; take scheme: int4")
        if self.bits and self.budget is not None:
            raise ConfigError(f"{KEY}: bits sets them by hand and budget by measurement; leave one of them out")
        if not self.choices or self.calibration < 1:
            got = f"{self.choices} and {self.calibration}"
            raise ConfigError(f"{KEY}: choices and calibration, in rows, are at least 1 of each; got {got}")
        for bits in [*self.bits.values(), *self.choices]:
            if not 2 <= bits <= 8:
                raise ConfigError(f"{KEY}: bits must be 2 to 8, got {bits}; for three values take scheme: ternary")
        if self.budget is not None and not self.choices[0] <= self.budget <= self.choices[-1]:
            raise ConfigError(f"{KEY}.budget is {self.budget:g} bits a weight, but choices are {self.choices}; take one between them")

    # ---- the student

    def prepare(self, student: PreTrainedModel, task: Task) -> None:
        """Choose the layers, the first time, and attach the fake quantisers; a budget's bits come later, see `_settle`."""
        layers = linears(student, self.include, self.exclude, KEY)
        if not self.schemes:
            found = self._by_pattern(layers)
            schemes.check_groups(layers, found, KEY)
            schemes.check_machine(found, KEY)
            self._sizes = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
            self.schemes = found
        if twice := [name for name, layer in layers.items() if fake_quant.quantisers(layer)]:
            raise ConfigError(f"{KEY}: two of them quantise '{twice[0]}'; say in include or exclude which layers belong to each")
        for name, layer in layers.items():
            fake_quant.attach(layer, self.schemes[name], self.owner)

    def _by_pattern(self, layers: Mapping[str, nn.Linear]) -> dict[str, Scheme]:
        for pattern in self.bits:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ConfigError(f"{KEY}.bits: '{pattern}' matches none of the layers; there are {', '.join(layers)}")
        first = {name: [bits for pattern, bits in self.bits.items() if fnmatchcase(name, pattern)][:1] for name in layers}
        return {name: replace(self.base, bits=bits[0]) if bits else self.base for name, bits in first.items()}

    def finish(self, student: PreTrainedModel) -> PreTrainedModel:
        """Leave the quantised values as the weights, and say in the config how they are quantised."""
        fake_quant.follow_checkpoint(student)
        kept, lost = {}, []
        for name, (layer, ours) in fake_quant.weights_of(student, self.owner).items():
            fake_quant.detach(layer)
            if ours.how.kind == "fp8" or integers.on_grid(stored(layer), ours.how):
                kept[name] = ours.how
            else:
                lost.append(name)
        integers.record(student, self.scheme, kept)
        if lost:
            print(f"Changed by another compression after they were quantised, so that exports quantise them anew: {', '.join(lost)}")
        return student

    # ---- the bits of a budget

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bits from the checkpoint that was loaded, or measure; not in `prepare`, which comes before any checkpoint."""
        if self.budget is None:
            return
        student = _student(pl_module)
        if not self.costs:
            self.costs = costs_alone(trainer, pl_module, self.owner, self.base, self.choices, self.calibration)
            chosen = sensitivity.assign(self.costs, self._sizes, self.budget)
            chosen = trainer.strategy.broadcast(chosen)  # ranks may round differently
            for name, (_, quantiser) in fake_quant.weights_of(student, self.owner).items():
                quantiser.bits.fill_(chosen[name])
        fake_quant.follow_checkpoint(student)
        self.schemes = {name: quantiser.how for name, (_, quantiser) in fake_quant.weights_of(student, self.owner).items()}

    def state_dict(self) -> dict[str, Any]:
        """Keep how each layer is quantised, and what was measured."""
        return {"schemes": {name: asdict(how) for name, how in self.schemes.items()}, "costs": self.costs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with what a checkpoint was trained with; take the bits where a budget is given.

        Raises:
            ConfigError: the layers are quantised in another way here.
        """
        for name, saved in ((name, Scheme(**how)) for name, how in state_dict["schemes"].items()):
            here = self.schemes.get(name)  # of other layers the tensors have other names, which is refused elsewhere
            if here is not None and saved != (here if self.budget is None else replace(here, bits=saved.bits)):
                raise ConfigError(
                    f"{KEY}: the checkpoint was trained with '{name}' as {_words(saved)}, but here it is {_words(here)}; go on with the "
                    "scheme and bits that it was trained with, or begin a new run, e.g. with the student that consolidate makes of it"
                )
            if here is not None:
                self.schemes[name] = saved
        self.costs = state_dict["costs"]

    @property
    def state_key(self) -> str:
        """Several callbacks, for different layers, have a state each."""
        return f"{type(self).__qualname__}{{'include': {self.include}, 'exclude': {self.exclude}}}"

    # ---- the steps

    def strength(self, step: int, total: int) -> float:
        """λ in an optimizer step, `clip((step − start) / warmup, 0, 1)`, of `total` steps: nothing else decides it, so that runs resume."""
        start, warmup = (_steps(value, total) for value in (self.start, self.warmup))
        return float(step >= start) if warmup == 0 else min(1.0, max(0.0, (step - start) / warmup))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what is known only now, and settle the bits of a budget."""
        total = int(trainer.estimated_stepping_batches)
        start, warmup = (_steps(value, total) for value in (self.start, self.warmup))
        if start + warmup >= total:
            raise ConfigError(
                f"{KEY}: start is step {start} and warmup takes {warmup} steps, but training has {total}: the student would be saved more "
                "quantised than it was trained; lower them"
            )
        self._refuse_hookless_head(trainer, pl_module)
        self._settle(trainer, pl_module)
        self._quantisers = fake_quant.quantisers(_student(pl_module), self.owner)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set λ."""
        strength = self.strength(trainer.global_step, int(trainer.estimated_stepping_batches))
        for quantiser in self._quantisers:
            quantiser.strength = strength

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantise wholly from now on, in whatever mode the student is."""
        for quantiser in self._quantisers:
            quantiser.strength = 1.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the bits for `validate`."""
        self._settle(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the bits for `test`."""
        self._settle(trainer, pl_module)

    def _refuse_hookless_head(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Under ZeRO-3 the head is called without its hooks (`parallel.gather.gathered`), so without the quantisation of its input."""
        student: Any = _student(pl_module)
        head = student.get_output_embeddings()
        if self.base.inputs and head is not None and fake_quant.quantisers(head) and shards_parameters(trainer.strategy):
            raise ConfigError(f"{KEY}: the head's input cannot be quantised where parameters are sharded; exclude it, or take zero2")

    # ---- what a person sees

    def summary(self) -> list[str]:
        """What is quantised, and since when."""
        if not self.schemes:
            return []
        groups = "a scale a " + ("weight" if self.base.kind == "ternary" else "row")
        groups = groups if self.base.group_size is None else f"groups of {self.base.group_size}"
        lines = [f"{self.scheme}, {groups} · {len(self.schemes)} layers · {self.average:.2f} bits a weight and the scales"]
        return [*lines, f"from step {self.start:g}, warm-up {self.warmup:g}"] if self.start or self.warmup else lines

    @property
    def average(self) -> float:
        """Bits a weight over the quantised layers, without the scales."""
        return sensitivity.average({name: how.bits for name, how in self.schemes.items()}, self._sizes)

    def figures(self) -> dict[str, Any]:
        """The bits of each layer and, where they were chosen by it, what quantising it alone costs, in nats."""
        found: dict[str, Any] = {"scheme": self.scheme, "bits": {name: how.bits for name, how in self.schemes.items()}}
        found |= {"bits_per_weight": self.average} if self.schemes else {}
        return found | ({"costs": self.costs} if self.costs else {})


def _words(how: Scheme) -> str:
    grouped = "no groups" if how.group_size is None else f"groups of {how.group_size}"
    return f"{how.kind}, {how.bits} bits, {grouped}{', 8-bit inputs' if how.inputs else ''}"


def _steps(value: float, total: int) -> int:
    return int(value if value >= 1 else value * total)


def _student(pl_module: Any) -> nn.Module:
    student = pl_module.student
    assert isinstance(student, nn.Module), "configure_model comes first"
    return student
