"""Students cut from a larger pretrained model: fewer layers, heads, neurons and channels, with the weights of those that stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from distill import hub
from distill.compress.factors import shapes
from distill.compress.families import family_of
from distill.compress.importance import Importance, by_activation, by_weights
from distill.compress.structured import head_dim
from distill.compress.width import check_width
from distill.students.agreed import of_rank_0
from distill.students.base import Student
from distill.students.kept import Kept, best, cut, kept_of, uniform
from distill.students.load import Pretrained
from distill.students.sizes import Sizes, asked, fitted, share, sizes_of, smaller_config
from distill.tasks import Task
from distill.types import ConfigError


class Shrunk(Student):
    """Cut a student out of a model with weights, usually its teacher: a plain model of transformers, whose weights are the teacher's.

    What is not given stays. With nothing cut it is the model itself.

    Args:
        model: a folder or a hub id.
        revision: of the hub id.
        layers: how many stay, or which (a list, from 0), or `every_other` (0, 2, 4, …).
        layer_choice: which of a number of layers: `uniform` keeps the first, the last, and evenly those between; `importance` those that
            change the direction of what passes most, `1 − cos(x_in, x_out)` (ShortGPT, arXiv 2403.03853).
        hidden_size: of the student.
        intermediate_size: of its feed-forward networks.
        num_attention_heads: of it; each keeps its width.
        num_key_value_heads: of it; queries leave together with their keys and values.
        target: share of the parameters, e.g. 0.4 or "40 %"; sizes that are not given are then chosen, see `sizes.fitted`.
        target_by: cut `width` or `depth` to reach the target.
        importance: of heads, neurons and channels: by `activation` on training batches (Minitron, arXiv 2407.14679), or by `weights` alone.
        calibration_batches: how many batches are measured.
        attn_implementation: as in `Pretrained`.
        gradient_checkpointing: as in `Pretrained`.

    Raises:
        ConfigError: nothing is to be cut, a number is out of range, or (when it is built) the model is of another family.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        layers: int | list[int] | Literal["every_other"] | None = None,
        layer_choice: Literal["uniform", "importance"] = "uniform",
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        target: float | str | None = None,
        target_by: Literal["width", "depth"] = "width",
        importance: Literal["activation", "weights"] = "activation",
        calibration_batches: int = 16,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.base = Pretrained(model, revision, attn_implementation, gradient_checkpointing)
        self.attn_implementation, self.gradient_checkpointing = attn_implementation, gradient_checkpointing
        self.given = {
            "hidden": hidden_size,
            "intermediate": intermediate_size,
            "heads": num_attention_heads,
            "groups": num_key_value_heads,
        }
        if layers is None and target is None and not any(self.given.values()):
            raise ConfigError("model.student: Shrunk has nothing to cut; give layers, a size or target, or take Pretrained")
        if layers is not None and target is not None and target_by == "depth":
            raise ConfigError("model.student: layers and a target by depth both say how many layers stay; give one, or target_by: width")
        if calibration_batches < 1:
            raise ConfigError(f"model.student.calibration_batches must be at least 1, got {calibration_batches}")
        self.layers, self.layer_choice, self.importance = layers, layer_choice, importance
        self.target = None if target is None else share(target, "model.student.target")
        self.target_by: Literal["width", "depth"] = target_by
        self.calibration_batches = calibration_batches
        self.name = f"{model}, shrunk"
        self.kept: Kept | None = None
        self.source: dict[str, Any] = {}  # of the whole model, see `hub.describe`

    def build(self, task: Task, expected: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Load the whole model and cut it; what stays is chosen once, by rank 0, so that every copy is cut alike."""
        if hub.looks_local(self.base.name) and not Path(self.base.name).is_dir():
            raise ConfigError(
                f"model.student.model: there is no folder '{self.base.name}' to cut the student from; a teacher's recipe makes it first, "
                "but not for a --dry-run: run the recipe, then look again"
            )
        model = self.base.build(task, expected, tokenizer, dtype)
        if shapes(model):
            raise ConfigError(
                f"model.student.model: '{self.base.name}' is of low rank already, and factors cannot be cut; shrink first, and make it of "
                "low rank after: LowRank with base: Shrunk"
            )
        family_of(model)
        self.source = hub.describe(model)
        if self.kept is None:
            self.kept = of_rank_0(self._choose(model, task))
        cut(model, self.kept)
        left, layers = self.kept.sizes, ", ".join(map(str, self.kept.layers))
        self.name = (
            f"{self.base.name} cut to {model.num_parameters() / self.source['parameters']:.0%}: layers {layers} · hidden {left.hidden} · "
            f"FFN {left.intermediate} · {left.heads} heads in {left.groups} groups"
        )
        return model

    def blueprint(self, task: Task, expected: dict[str, Any]) -> Any:
        """The whole model's configuration, with the sizes that it will be cut to."""
        with torch.device("meta"):
            model = task.build(self.base.blueprint(task, expected))
        family_of(model)
        return self._smaller(model, self._sizes(model, task))

    def _sizes(self, model: PreTrainedModel, task: Task) -> Sizes:
        """What the configuration says after the cut; read off a model with weights or without."""
        before = sizes_of(model)
        named = self._named(before.layers)
        count = self.layers if isinstance(self.layers, int) else None
        after = asked(model, len(named) if named else count, self.given)
        if self.target is None:
            return after
        fixed = {name for name, value in self.given.items() if value is not None}
        return fitted(model, task, after, fixed, self.target, self.target_by)

    def _smaller(self, model: PreTrainedModel, after: Sizes) -> Any:
        if after.hidden < sizes_of(model).hidden:
            check_width(model.config.model_type)
        return smaller_config(model.config, after, list(range(after.layers)), head_dim(model))

    def _choose(self, model: PreTrainedModel, task: Task) -> Kept:
        before, after = sizes_of(model), self._sizes(model, task)
        named = self._named(before.layers)
        self._smaller(model, after)  # refused whole rather than half cut
        by_influence = named is None and after.layers < before.layers and self.layer_choice == "importance"
        scores = self._scores(model, task, by_influence, (after.hidden, after.intermediate, after.heads))
        if by_influence:
            assert scores.layers is not None
            named = best(scores.layers, after.layers).tolist()
        return kept_of(scores, before, after, named or uniform(before.layers, after.layers))

    def _named(self, count: int) -> list[int] | None:
        layers = list(range(0, count, 2)) if self.layers == "every_other" else self.layers
        if not isinstance(layers, list):
            return None
        if not layers or len(set(layers)) < len(layers) or min(layers) < 0 or max(layers) >= count:
            raise ConfigError(f"model.student.layers must be different numbers from 0 to {count - 1}, as the model has, got {layers}")
        return sorted(layers)

    def _scores(self, model: PreTrainedModel, task: Task, by_influence: bool, width: tuple[int, int, int]) -> Importance:
        """Score by the weights, unless what is cut asks for more."""
        before = sizes_of(model)
        cuts_width = width != (before.hidden, before.intermediate, before.heads)
        weights = by_weights(model)
        if not by_influence and not (cuts_width and self.importance == "activation"):
            return weights
        if self.batches is None:
            raise ConfigError(
                "model.student: no data are here to measure importance on; take importance: weights and layer_choice: uniform"
            )
        with _runnable_attention(model):
            measured = by_activation(model, task, islice(self.batches(), self.calibration_batches))
        return measured if self.importance == "activation" else replace(weights, layers=measured.layers)


@contextmanager
def _runnable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use torch's attention meanwhile: flash kernels want a GPU and half precision, and the trainer has not moved the model yet."""
    given = model.config._attn_implementation
    if "flash" in (given or ""):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != given:
            model.set_attn_implementation(given)
