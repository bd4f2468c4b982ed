"""Students whose linear layers are cut to a low rank before they are trained."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import hub
from distill.compress.factors import Factored, label, put_factors, shapes
from distill.compress.importance import means
from distill.compress.select import linears
from distill.compress.svd import Spectrum, decompose, factors, rank_of_energy, ranks_for_budget, ranks_for_energy
from distill.exact import cast
from distill.students.agreed import of_rank_0
from distill.students.base import Batches, Student
from distill.students.load import FromConfig
from distill.students.lora import LoRA
from distill.students.shrink import Shrunk
from distill.students.sizes import share
from distill.tasks import Task
from distill.types import ConfigError

KEY = "model.student"


class LowRank(Student):
    """Train `B A` in the place of W: A `[r, in]` and B `[out, r]` are the best approximation of W of rank r at the start.

    It is a student rather than a callback, for what a callback adds must leave the structure of the model as it is: here the weights
    themselves are other ones, from the first step on. A layer that two factors would make larger (`r ≥ in · out / (in + out)`) stays dense.

    Args:
        base: the student to cut, one with weights, e.g. `Pretrained` or `Shrunk`.
        rank: r of every layer.
        energy: share of each layer's energy `Σ σ²` to keep, in (0, 1]; gives each its own rank.
        target: share of the whole model's parameters, e.g. 0.4 or "40 %"; takes the highest energy share, one for all layers, that fits.
        include: patterns of the names of the linears; None for all but the head.
        exclude: patterns of those that stay dense.
        activation_aware: approximate `W x` on training batches, not W, see `svd.decompose`; takes `in²` float64 values a layer.
        calibration_batches: how many batches that takes.

    Raises:
        ConfigError: not exactly one of rank, energy and target, a number out of range, or (when it is built) patterns that match nothing.
    """

    def __init__(
        self,
        base: Student,
        rank: int | None = None,
        energy: float | None = None,
        target: float | str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        activation_aware: bool = False,
        calibration_batches: int = 16,
    ) -> None:
        given = {"rank": rank, "energy": energy, "target": target}
        if sum(value is not None for value in given.values()) != 1:
            raise ConfigError(f"{KEY}: give one of rank, energy and target, got {given}")
        if rank is not None and rank < 1:
            raise ConfigError(f"{KEY}.rank must be at least 1, got {rank}")
        if energy is not None and not 0 < energy <= 1:
            raise ConfigError(f"{KEY}.energy must be above 0 and at most 1, got {energy}; it is a share of Σ σ²")
        if calibration_batches < 1:
            raise ConfigError(f"{KEY}.calibration_batches must be at least 1, got {calibration_batches}")
        if isinstance(base, FromConfig):
            raise ConfigError(f"{KEY}.base is FromConfig, whose random weights have no low rank; take Pretrained or Shrunk")
        if isinstance(base, LoRA):
            raise ConfigError(f"{KEY}.base is LoRA, which has layers of its own; turn them round: LoRA with the base LowRank")
        self.base, self.rank, self.energy = base, rank, energy
        self.target = None if target is None else share(target, f"{KEY}.target")
        self.include, self.exclude = include, exclude
        self.activation_aware, self.calibration_batches = activation_aware, calibration_batches
        self.ranks: dict[str, int] | None = None
        self.source: dict[str, Any] = {}  # of the whole model, see `hub.describe`
        self.name = f"{base.name} + low rank"

    def calibrate_on(self, batches: Batches) -> None:
        """Keep them, and hand them to the base."""
        super().calibrate_on(batches)
        self.base.calibrate_on(batches)

    def build(self, task: Task, expected: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Build the base and cut it; in float32, so that the ranks do not depend on what it will be trained in."""
        model = self.base.build(task, expected, tokenizer, torch.float32)
        if shapes(model):
            raise ConfigError(f"{KEY}.base: '{self.base.name}' is of low rank already; train it as it is, with Pretrained")
        chosen = linears(model, self.include, self.exclude, KEY)
        moments = self._moments(model, task, list(chosen))
        found = {name: decompose(linear.weight, moments.get(name)) for name, linear in chosen.items()}
        if self.ranks is None:
            self.ranks = of_rank_0(self._ranks(model, {name: Spectrum(_shape(chosen[name]), sigma) for name, (_, sigma) in found.items()}))
        self.source = self.base.source if isinstance(self.base, Shrunk) else hub.describe(model)
        before = model.num_parameters()
        low_rank(model, {name: factors(chosen[name].weight, found[name][0], rank) for name, rank in self.ranks.items()})
        low, high = min(self.ranks.values()), max(self.ranks.values())
        self.name = f"{self.base.name} + low rank: {len(self.ranks)} layers of rank {low} to {high}, {model.num_parameters() / before:.0%}"
        cast(model, dtype)
        return model

    def _ranks(self, model: PreTrainedModel, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        if self.energy is not None:
            ranks = ranks_for_energy(spectra, self.energy)
        elif self.target is not None:
            dense = model.num_parameters()
            rest = dense - sum(spectrum.parameters(None) for spectrum in spectra.values())
            ranks = ranks_for_budget(spectra, int(self.target * dense) - rest)
            least = rest + sum(min(spectrum.parameters(1), spectrum.parameters(None)) for spectrum in spectra.values())
            if least > self.target * dense:
                raise ConfigError(f"{KEY}.target: rank 1 everywhere leaves {least / dense:.1%} of the parameters, not {self.target:.1%}")
        else:
            assert self.rank is not None
            ranks = {name: self.rank for name, spectrum in spectra.items() if spectrum.pays(self.rank)}
        if not ranks:
            raise ConfigError(f"{KEY}: no layer would become smaller{self._why(spectra)}")
        return ranks

    def _why(self, spectra: Mapping[str, Spectrum]) -> str:
        most = max(out * into / (out + into) for out, into in (spectrum.shape for spectrum in spectra.values()))
        needed = (
            ""
            if self.energy is None
            else f"; an energy of {self.energy} takes ranks from "
            + str(min(rank_of_energy(spectrum.sigma, self.energy) for spectrum in spectra.values()))
        )
        return f": the widest gains below rank {most:.0f}{needed}; take a lower {'energy' if self.energy else 'rank or target'}"

    def _moments(self, model: PreTrainedModel, task: Task, names: Sequence[str]) -> dict[str, Tensor]:
        if not self.activation_aware:
            return {}
        if self.batches is None:
            raise ConfigError(f"{KEY}: no data are here for activation_aware; leave it out")
        measures: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {name: ((f"{name}:input",), _outer) for name in names}
        return means(model, task, islice(self.batches(), self.calibration_batches), measures)


def low_rank(model: PreTrainedModel, cut: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put two factors in the place of linears, and write so into the model's config, in place.

    Args:
        model: of transformers.
        cut: A `[r, in]` and B `[out, r]` by the dotted name of the linear; its bias stays.
    """
    biases = {name: model.get_submodule(name).bias for name in cut}
    put_factors(model, {name: len(first) for name, (first, _) in cut.items()})
    for name, (first, second) in cut.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Factored)
        layer.first.weight, layer.second.weight = nn.Parameter(first), nn.Parameter(second)
        layer.second.bias = biases[name]
    label(model)


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _outer(x: Tensor) -> Tensor:
    """`Σ_n x_n x_nᵀ` as one position, `[1, D, D]`: as many as there are positions would not fit."""
    return (x.T @ x)[None]
