"""What every floor shares: the shape legend, `Outputs`, and the errors a person may meet.

Shape legend, used as suffixes of names where a reader would otherwise have to work the shape out:

    B  sequences or samples in a micro-batch
    T  positions in a sequence (1 for a classification task)
    N  valid positions of a micro-batch, flattened: those whose label is not `IGNORE_INDEX`
    D  width of the features that enter the head
    V  classes, or tokens of the vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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


class DistillError(Exception):
    """A mistake that a person can mend: the message names the cause, the values seen, and the fix. Shown without a traceback."""


class ConfigError(DistillError, ValueError):
    """A key of the configuration has a value that cannot work."""


class DataError(DistillError, ValueError):
    """A file, row or column of the data is not what the configuration says."""


class TrainingError(DistillError, RuntimeError):
    """Training cannot go on, e.g. because a loss is not finite."""
