"""What a format is that a student is exported to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.compress.factors import shapes
from distill.export.grid import Grid
from distill.report.costs.served import inputs_of
from distill.tasks import Task
from distill.types import Batch, ConfigError, DistillError

Run = Callable[[Batch], Tensor]


class ExportError(DistillError, RuntimeError):
    """An export does not give what the student gives, or could not be written; what was there before is untouched."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: the student, float32, in `eval`.
        tokenizer: of the student.
        task: what it is for.
        calibration: gives batches of training rows, the same at every call.
        grids: the integers and scales of layers whose weights were quantised already, in training or after it, by dotted name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    calibration: Callable[[], Iterable[Batch]]
    grids: Mapping[str, Grid]

    @property
    def model_type(self) -> str:
        """The architecture, e.g. `llama`."""
        return str(self.model.config.model_type)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the exported graph takes, in order."""
        return tuple(self.example())

    def example(self) -> dict[str, Tensor]:
        """The inputs of a batch of calibration rows."""
        return inputs_of(next(iter(self.calibration())))

    def learned(self, bits: int) -> dict[str, Grid]:
        """The grids that fit into so many bits: their integers and scales are carried over, not chosen anew."""
        return {name: grid for name, grid in self.grids.items() if grid.how.bits <= bits}


class Format(ABC):
    """One way to store and run a student; one file, found by its class.

    Args:
        precision: one of `precisions`; None for the first.

    Attributes:
        name: what it is called on the command line.
        precisions: how far the logits may be from the student's, by name of the precision: the mean over positions of
            `KL(student ‖ export)` in nats; 0 where every logit must be the same to the bit. It catches what is broken, and is no promise
            of quality. Whatever it is, half of the KL of the best constant is the most that passes, see `Gap.within`: a student of two
            classes may be no further than that from a model that knows nothing.
        runtime: what it is for, where that is not what `load` runs: its times would be those of something else.

    Raises:
        ConfigError: no such precision.
    """

    name: ClassVar[str]
    precisions: ClassVar[Mapping[str, float]]
    runtime: ClassVar[str | None] = None

    def __init__(self, precision: str | None = None) -> None:
        self.precision = precision or next(iter(self.precisions))
        if self.precision not in self.precisions:
            raise ConfigError(f"precision: {self.name} has no '{self.precision}'; it has {', '.join(self.precisions)}")

    @property
    def tolerance(self) -> float:
        """The largest mean KL to the student, in nats."""
        return self.precisions[self.precision]

    def check(self, source: Source) -> None:  # noqa: B027  # a format that needs nothing has nothing to refuse
        """Refuse before any work is done.

        Raises:
            ConfigError: a package is missing, or the architecture cannot be stored so.
        """

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Write everything but the tokenizer into an empty folder.

        Raises:
            ConfigError: this student cannot be stored so.
            ExportError: what stands there is not what it should be.
        """

    @abstractmethod
    def load(self, folder: Path, task: Task) -> Run:
        """Load what `write` has left, with the runtime it is for, which takes as many threads as torch has.

        Returns:
            A function from a batch to its logits on the CPU: `[B, T, V]` for tokens, `[B, V]` for samples.
        """


def refuse_factors(source: Source, format_name: str) -> None:
    """Refuse a student of low rank, for formats that know dense layers only.

    Raises:
        ConfigError: it has factored layers.
    """
    factored = list(shapes(source.model))
    if factored:
        raise ConfigError(
            f"format: {format_name} cannot store layers of two factors, and {len(factored)} are, e.g. '{factored[0]}'; take hf, packed, "
            "onnx or openvino, which keep them, or save `distill.compress.factors.multiplied_out(student)` and export that as --student"
        )


def refuse_odd(source: Source, format_name: str, precision: str, block: int, other: str) -> None:
    """Refuse a student most of whose rows blocks do not fill: it would stay in floats under a name that says otherwise.

    Raises:
        ConfigError: more than half of the linear layers' weights are in such rows.
    """
    layers = {name: module for name, module in source.model.named_modules() if isinstance(module, nn.Linear)}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    odd = [name for name, layer in layers.items() if layer.in_features % block]
    if 2 * sum(sizes[name] for name in odd) > sum(sizes.values()):
        raise ConfigError(
            f"format: {format_name} {precision} has blocks of {block} weights, which do not fill the rows of {len(odd)} of {len(layers)} "
            f"linear layers, e.g. the {layers[odd[0]].in_features} inputs of '{odd[0]}', and these would stay floats; take {other}"
        )


def need(package: str, format_name: str) -> Any:
    """Import a package that only some formats need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise ConfigError(
            f"format: {format_name} needs the package {error.name}, which is not installed: pip install 'distill[export]'"
        ) from None
