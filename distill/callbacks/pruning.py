"""Pruning while training: weights, or whole neurons, heads and layers, are masked step by step, and taken out in the end."""

import pytorch_lightning as pl
from torch import Tensor
from transformers import PreTrainedModel

from distill.callbacks.masking import Masking
from distill.compress.groups import Structure
from distill.compress.mask import Mask
from distill.compress.norms import input_norms
from distill.compress.pruner import KINDS, Method, Parts, Pruner, Weights
from distill.compress.sparsity import Kind, Scope, sparsity_at
from distill.parallel.through import through
from distill.tasks import Task
from distill.types import Batch, ConfigError


class Pruning(Masking):
    """Masks a growing share of the student's weights, those that matter least, and trains on with the rest.

    The masks are set at the start of an optimizer step, from the weights as they are then: those that a rank sees are those that all
    see. They are buffers of the student. Single weights end as zeros, which make a model smaller when it is packed and no faster; parts
    (`structure`) are really taken out of the student that is saved, the same number of every layer.

    Args:
        sparsity: share that is masked in the end, in [0, 1): of the chosen weights, or of the neurons, heads or layers.
        method: what a weight is worth. `magnitude` |w|; `movement` how training moves it away from 0 (learned scores, Sanh et al. 2020),
            better than magnitude at high sparsity of pretrained models; `displacement` |w − w₀|; `wanda` |w|·‖x‖ on the batch of the
            step; `random`. Formulas in `distill.compress.scores`.
        schedule: `cubic` from 0 at `begin` to `sparsity` at `end`; `one_shot` at `begin`; `iterative`, in `turns` equal parts of what is
            left between them, each followed by training.
        structure: prune `neurons` of the feed-forward networks, attention `heads` (equally many of each group that shares keys and values),
            `kv_groups` (such a group with its queries) or `layers`; None for single weights. A part is worth the sum of its weights.
        scope: single weights are compared within the whole model (`global`), a `layer` or a `row`; None for what the method's authors
            do, `row` for wanda and `layer` else.
        include: patterns of the names of the linears, e.g. `*.mlp.*`; None for all but the head.
        exclude: patterns of those to leave out.
        begin, end: shares of all optimizer steps.
        every: optimizer steps between two masks; None for 1 with `movement`, as published, and 10 else. Scores that are learned straight
            through the mask overshoot where it stands still: many weights that pull the same way go at once.
        turns: of `iterative`.
        seed: of `random`.

    Raises:
        ConfigError: a value is out of its range, or two do not go together.
    """

    def __init__(
        self,
        sparsity: float,
        method: Method = "magnitude",
        schedule: Kind = "cubic",
        structure: Structure | None = None,
        scope: Scope | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        every: int | None = None,
        turns: int = 5,
        seed: int = 0,
    ) -> None:
        self.check_ranges(
            ("sparsity", sparsity, 0 <= sparsity < 1, "in [0, 1), the share that is masked"),
            ("turns", turns, turns >= 1, "at least 1"),
        )
        self.sparsity, self.method, self.schedule, self.turns, self.seed = sparsity, method, schedule, turns, seed
        if schedule != "cubic" and self.remembers and begin == 0:
            raise ConfigError(f"{self.key()}: {method} knows nothing before training; set begin above 0")
        every = every if every is not None else 1 if method == "movement" else 10
        super().__init__(self._pruner(structure, scope, include, exclude), begin, end, every)

    def _pruner(self, structure: Structure | None, scope: Scope | None, include: list[str] | None, exclude: list[str] | None) -> Pruner:
        kind = KINDS.get(self.method, Mask)
        if structure is None:
            return Weights(kind, scope or ("row" if self.method == "wanda" else "layer"), include, exclude, self.key())
        if include or exclude or scope:
            raise ConfigError(
                f"{self.key()}: structure takes as many {structure} out of each layer, for a config of transformers holds one number; "
                "leave include, exclude and scope out"
            )
        return Parts(kind, structure, self.key())

    @property
    def remembers(self) -> bool:
        """Scores are learned, and distances from the start are as small as the steps."""
        return self.method in ("movement", "displacement")

    def prepare(self, student: PreTrainedModel, task: Task) -> None:
        """Put the masks on, where the share can be reached."""
        self.pruner.check_sparsity(student, self.sparsity)
        super().prepare(student, task)

    def summary(self) -> list[str]:
        """What is pruned, how, and how far it has come."""
        when = f"at {self.begin:.0%}" if self.schedule == "one_shot" else f"from {self.begin:.0%} to {self.end:.0%}"
        return [f"{self.sparsity:.0%} of the {self.pruner.unit} by {self.method}, {self.schedule} {when} of the steps", *super().summary()]

    def span(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Begin no sooner than there is something to remember."""
        first, last = super().span(trainer)
        return (max(1, first), max(1, last)) if self.remembers else (first, last)

    def update(self, trainer: pl.Trainer, step: int, first: int, last: int, batch: Batch) -> None:
        """Keep what is worth most."""
        learned = self.method == "movement"  # its scores are trained to the end
        sparsity = sparsity_at(step, first, last, self.sparsity, self.schedule, self.every, self.turns, after=learned)
        if sparsity is None:
            return
        student, pruner = self.student, self.pruner
        assert student is not None, "on_fit_start comes first"
        norms: dict[str, Tensor] = {}
        if self.method == "wanda":
            norms = input_norms(student, pruner.names(student), batch, lambda: through(trainer, "measures", batch))
        pruner.update(student, sparsity, lambda name: pruner.score_of(student, name, self.method, self.seed, norms))
