"""What every floor shares: the shape legend, `Outputs`, and the errors a person may meet.

Shape legend, used as suffixes of names where a reader would otherwise have to work the shape out:

    B  sequences or samples in a micro-batch
    T  positions in a sequence (1 for a classification task)
    N  valid positions of a micro-batch, flattened: those whose label is not `IGNORE_INDEX`
    D  width of the features that enter the head
    V  classes, or tokens of the vocabulary
    K  classes of which a sparse target says something
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

IGNORE_INDEX = -100

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass gives: the input of the head, the head itself, and the activations that a loss asked for.

    Attributes:
        features: `[B, T, D]`, the input of the head.
        head: maps features to logits; applied lazily, chunk by chunk, so that no `[N, V]` tensor need exist.
        taps: intermediate activations by the name they were asked for.
    """

    features: Tensor
    head: nn.Module
    taps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """What a teacher says of K classes at each position; all other classes are one bin, the tail.

    `Σ_k probs + tail = 1` at every position with a label. Either the K likeliest classes with their probabilities and the rest of the mass
    as the tail, or an unbiased estimate by random draws, of which nothing is left for the tail.

    Attributes:
        ids: `[B, T, K]`, int64: different classes; −1 fills up where a position has fewer, never the first.
        probs: `[B, T, K]`, float32: their probabilities; 0 where `ids` is −1.
        tail: `[B, T]`, float32: the probability of all other classes.
        temperature: T of the softmax that the probabilities come from.
        taps: intermediate activations by the name they were asked for.
    """

    ids: Tensor
    probs: Tensor
    tail: Tensor
    temperature: float = 1.0
    taps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MixedTarget:
    """The targets of several teachers for one batch.

    Attributes:
        parts: M targets, none of them mixed.
        weights: `[B, T, M]`, ≥ 0, with sum 1 at every position with a label.
        how: `probabilities` for the target `Σ_m w_m p_m`; `log_probabilities` for `p ∝ exp Σ_m w_m log p_m`; `apart` for terms evaluated
            against each by itself, `Σ_m w_m L(p_m, q)`.
        taps: intermediate activations by the name they were asked for.
    """

    parts: "tuple[Outputs | SparseTarget, ...]"
    weights: Tensor
    how: Literal["probabilities", "log_probabilities", "apart"]
    taps: dict[str, Tensor] = field(default_factory=dict)


Target = Outputs | SparseTarget | MixedTarget

Support = Literal["classes", "bins", "draws", "text"]
"""What a target is known on: all classes; K of them and a tail; classes drawn at random; or only the same text, in other tokens."""


class DistillError(Exception):
    """A mistake that a person can mend: the message names the cause, the values seen, and the fix. Shown without a traceback."""


class ConfigError(DistillError, ValueError):
    """A key of the configuration has a value that cannot work."""


class DataError(DistillError, ValueError):
    """A file, row or column of the data is not what the configuration says."""


class TrainingError(DistillError, RuntimeError):
    """Training cannot go on, e.g. because a loss is not finite."""
