"""What is pruned: single weights, or groups of them. Each adds its masks to a model, sets them, and carries them out in the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from distill.compress import groups, pass_by
from distill.compress.fake_quant import FakeQuantisedWeight, stored
from distill.compress.families import layers_of
from distill.compress.groups import Groups, Structure, groups_of
from distill.compress.mask import DisplacementMask, Mask, MovementMask, burn, mask_of, masks_of, own_weight, parametrizations, put
from distill.compress.scores import random, wanda
from distill.compress.select import linears
from distill.compress.sparsity import Scope, masks
from distill.types import ConfigError

Method = Literal["magnitude", "movement", "displacement", "wanda", "random"]
KINDS: dict[str, type[Mask]] = {"movement": MovementMask, "displacement": DisplacementMask}
Score = Callable[[str], Tensor]


class Pruner(ABC):
    """Masks in a model.

    Args:
        kind: of the masks.
        unit: what is pruned, in the plural.

    Attributes:
        owner: a number of its own, by which it finds its masks in any model that it has prepared.
    """

    _owners = count()

    def __init__(self, kind: Callable[..., Mask], unit: str) -> None:
        self.owner, self.kind, self.unit = next(self._owners), kind, unit

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> None:
        """Add the masks.

        Raises:
            ConfigError: there is nothing to prune, or it cannot be.
        """

    def check_sparsity(self, model: PreTrainedModel, sparsity: float) -> None:  # noqa: B027  # single weights have any
        """Look at what share can be reached.

        Raises:
            ConfigError: one is asked for, but nothing would be masked.
        """

    @abstractmethod
    def names(self, model: PreTrainedModel) -> list[str]:
        """The linears whose weights are scored, by dotted name."""

    @abstractmethod
    def update(self, model: PreTrainedModel, sparsity: float, score: Score) -> None:
        """Set the masks anew.

        Args:
            model: prepared.
            sparsity: share that is to be masked.
            score: gives the scores `[out, in]` of a linear; every rank must ask for the same ones in the same order.
        """

    @abstractmethod
    def counts(self, model: PreTrainedModel) -> tuple[int, int]:
        """How many are masked, of how many."""

    @abstractmethod
    def finish(self, model: PreTrainedModel) -> None:
        """Carry the masks out and take them off, in place."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027  # single weights get on with everything
        """Look at a model that all compressions have prepared.

        Raises:
            ConfigError: another compression holds tensors of a weight that will be cut.
        """

    def score_of(self, model: PreTrainedModel, name: str, method: Method, seed: int, norms: dict[str, Tensor]) -> Tensor:
        """Score the weights of a linear, `[out, in]`, float32.

        Args:
            model: prepared.
            name: of the linear.
            method: how; see `scores`.
            seed: of `random`.
            norms: of `wanda`, see `norms.input_norms`.
        """
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        mask = mask_of(module, self.owner)
        with own_weight(module, mask) as weight:
            if method == "wanda":
                return wanda(weight, norms[name])
            if method == "random":
                return random(weight.shape, seed + self.names(model).index(name)).to(weight.device)
            return Mask.score(Mask(weight, ()), weight) if mask is None else mask.score(weight)


class Weights(Pruner):
    """Single weights.

    Args:
        kind: of the masks.
        scope: which weights are compared with each other.
        include, exclude: patterns of the linears, see `select.linears`.
        key: of the configuration, for messages.
    """

    def __init__(self, kind: Callable[..., Mask], scope: Scope, include: list[str] | None, exclude: list[str] | None, key: str) -> None:
        super().__init__(kind, "weights")
        self.scope, self.include, self.exclude, self.key = scope, include, exclude, key

    def prepare(self, model: PreTrainedModel) -> None:
        """Put a mask on each linear."""
        for module in linears(model, self.include, self.exclude, self.key).values():
            put(module, self.kind(stored(module), owner=self.owner))

    def names(self, model: PreTrainedModel) -> list[str]:
        """The masked linears."""
        return list(masks_of(model, self.owner))

    def update(self, model: PreTrainedModel, sparsity: float, score: Score) -> None:
        """Keep the largest scores."""
        found = [mask for _, mask in masks_of(model, self.owner).values()]
        names = self.names(model)
        # one matrix at a time, unless all are compared with each other
        parts = [list(range(len(names)))] if self.scope == "global" else [[i] for i in range(len(names))]
        for part in parts:
            for i, new in zip(part, masks([score(names[i]) for i in part], sparsity, self.scope), strict=True):
                found[i].mask.copy_(new)

    def counts(self, model: PreTrainedModel) -> tuple[int, int]:
        """Weights that are masked, of those that have a mask."""
        found = [mask.mask for _, mask in masks_of(model, self.owner).values()]
        total = sum(mask.numel() for mask in found)
        return total - sum(int(mask.sum()) for mask in found), total

    def finish(self, model: PreTrainedModel) -> None:
        """Write the zeros into the weights."""
        for module, mask in masks_of(model, self.owner).values():
            burn(module, mask)


class Parts(Pruner):
    """Neurons, heads, groups of heads, or layers.

    A group is masked where it goes out: with the columns of the linear behind it at 0, its rows do nothing, and get no gradient. So scores
    that are learned are those of the columns, which get theirs straight through the mask; a layer that is passed by gets none.

    Args:
        kind: of the masks.
        structure: what the groups are.
        key: of the configuration, for messages.
    """

    def __init__(self, kind: type[Mask], structure: Structure, key: str) -> None:
        super().__init__(kind, structure)
        self.structure, self.key = structure, key

    def prepare(self, model: PreTrainedModel) -> None:
        """Put a mask on the linear behind each layer's groups, or a switch into the layer; what is remembered on all that is scored."""
        for layer, group in zip(layers_of(model), self._groups(model), strict=True):
            if group.columns is None:
                pass_by.add(layer, self.owner)
            for name in self._scored(group):
                module = model.get_submodule(name)
                assert isinstance(module, nn.Linear)
                if name == group.columns:
                    put(module, self.kind(stored(module), (1, module.in_features), self.owner))
                elif self.kind is not Mask:
                    put(module, self.kind(stored(module), (1, 1), self.owner))

    def _scored(self, group: Groups) -> tuple[str, ...]:
        return group.linears if group.columns is None or self.kind is not MovementMask else (group.columns,)

    def _groups(self, model: PreTrainedModel) -> list[Groups]:
        try:
            return groups_of(model, self.structure)
        except ConfigError as error:
            raise ConfigError(f"{self.key}.structure={self.structure}: {error}") from None

    def check_sparsity(self, model: PreTrainedModel, sparsity: float) -> None:
        """Refuse a share that is rounded to none."""
        alone = self._groups(model)[0].alone
        if sparsity == 0 or groups.kept_groups(model, self.structure, sparsity) < alone:
            return
        shares = [f"{1 - kept / alone:.3g}" for kept in groups.loadable_counts(model, self.structure)[::-1]]
        fix = f"take a sparsity of {', '.join(shares[:5])}{' or more' if len(shares) > 5 else ''}" if shares else "prune something else"
        raise ConfigError(
            f"{self.key}: sparsity {sparsity:g} takes none of {alone} {self.structure} out, since no number between can be had that "
            f"transformers loads; {fix}"
        )

    def check(self, model: PreTrainedModel) -> None:
        """Refuse other parametrizations of what is cut: their tensors would have the old shape, and their groups other weights.

        With layers a fake quantiser's record would keep the numbers that the layers had before.
        """
        refused: type[nn.Module] = FakeQuantisedWeight if self.structure == "layers" else nn.Module
        for group in self._groups(model):
            for name in group.linears:
                module = model.get_submodule(name)
                assert isinstance(module, nn.Linear)
                for other in parametrizations(module) if parametrize.is_parametrized(module, "weight") else ():
                    if isinstance(other, refused) and not (isinstance(other, Mask) and other.owner == self.owner):
                        raise ConfigError(
                            f"{self.key} will cut '{name}', whose weight goes through {type(other).__name__} of another callback; prune in "
                            "a run of its own, and make the result (runs/NAME/student) the student of the next"
                        )

    def names(self, model: PreTrainedModel) -> list[str]:
        """The linears that tell what the groups are worth."""
        return [name for group in self._groups(model) for name in self._scored(group)]

    def update(self, model: PreTrainedModel, sparsity: float, score: Score) -> None:
        """Keep the groups that are worth most, as many in each layer."""
        found = self._groups(model)
        worths = [group.worth({name: score(name) for name in self._scored(group)}) for group in found]
        kept = groups.choose(worths, self.structure, found[0].alone, groups.kept_groups(model, self.structure, sparsity))
        for layer, group, marks in zip(layers_of(model), found, kept, strict=True):
            if group.columns is None:
                pass_by.switch_of(layer).kept.copy_(marks[0])
            else:
                mask = self._mask(model, group.columns)
                mask.copy_(marks.repeat_interleave(mask.shape[1] // group.count)[None])

    def counts(self, model: PreTrainedModel) -> tuple[int, int]:
        """Groups that are masked, of all."""
        marks = torch.cat(self._kept(model))
        return int((~marks).sum()), len(marks)

    def finish(self, model: PreTrainedModel) -> None:
        """Cut the masked groups out."""
        kept = self._kept(model)
        for module, mask in masks_of(model, self.owner).values():
            burn(module, mask)
        if self.structure == "layers":
            for layer in layers_of(model):
                pass_by.remove(layer)
        groups.remove(model, self.structure, kept)

    def _kept(self, model: PreTrainedModel) -> list[Tensor]:
        found = []
        for layer, group in zip(layers_of(model), self._groups(model), strict=True):
            if group.columns is None:
                found.append(pass_by.switch_of(layer).kept.view(1))
            else:
                found.append(self._mask(model, group.columns)[0].view(group.count, -1)[:, 0])
        return found

    def _mask(self, model: PreTrainedModel, name: str) -> Tensor:
        mask = mask_of(model.get_submodule(name), self.owner)
        assert mask is not None
        return mask.mask
