"""What advice is made of: figures that say where they come from, forms that a model can be shipped in, and the situation of the person."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from distill.students.sizes import Sizes

Target = Literal["size", "latency", "quality"]
Kind = Literal["keep", "ptq", "qat", "prune", "distil", "combine"]
Leaf = Literal["keep", "ptq", "qat", "prune", "distil", "combine", "too short", "impossible"]
TRAINED = ("qat", "prune", "distil", "combine")


class Figure(NamedTuple):
    """A number, whether it was measured here or is estimated, and what it rests on in a few words."""

    value: float
    measured: bool
    basis: str

    def as_dict(self) -> dict[str, float | str]:
        """For advice.json."""
        return {"value": self.value, "how": "measured" if self.measured else "estimated", "basis": self.basis}


class Loss(NamedTuple):
    """What a form costs in quality, in points of accuracy or nats of held-out loss; whether on this very model; and where that is from."""

    value: float
    unit: Literal["points", "nats"]
    measured: bool
    basis: str


@dataclass(frozen=True)
class Budget:
    """What must not be exceeded.

    Attributes:
        limit: bytes, milliseconds, or the loss of quality in `unit`.
        unit: of the limit.
        text: as a person wrote it.
    """

    limit: float
    unit: Literal["bytes", "ms", "points", "nats"]
    text: str


@dataclass(frozen=True)
class Form:
    """A model as it would be shipped.

    Attributes:
        name: in words.
        kind: what is done to get there.
        export: format and precision, e.g. `onnx:int8`.
        sizes: of the student; None for the teacher's own, and where the architecture's sizes are not known.
        parameters: of it.
        bytes: of its files.
        ms: of one row; None where nothing is known.
        hours: of training; None where it is not trained.
        tokens: that these hours are for; None where it is not trained.
        loss: of quality; None where nobody has measured it.
        scheme: that it is trained in, of `QuantizationAwareTraining`.
        sparsity: share of the neurons that training takes out.
        note: what to know before it is shipped.
    """

    name: str
    kind: Kind
    export: str
    sizes: Sizes | None
    parameters: int
    bytes: Figure
    ms: Figure | None
    hours: Figure | None = None
    tokens: int | None = None
    loss: Loss | None = None
    scheme: str | None = None
    sparsity: float | None = None
    note: str = ""

    @property
    def trained(self) -> bool:
        """Whether it takes training."""
        return self.kind in TRAINED


@dataclass(frozen=True)
class Situation:
    """All that the decision is made of.

    Attributes:
        target: what must become smaller, or must not be lost.
        budget: how far.
        hours: that there are for training; None where time does not matter.
        forms: the first is the teacher as it is; then every form that can be had, in the order in which they are preferred: what changes
            least comes first.
        gains: speed of runtimes and of smaller layers here, by name, × the float32 model in PyTorch.
        missing: what could not be looked at, by name, and why.
    """

    target: Target
    budget: Budget
    hours: float | None
    forms: tuple[Form, ...]
    gains: dict[str, Figure]
    missing: dict[str, str]


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        what: to do.
        why: which branch of the tree it is, with the values.
        form: what it gives.
    """

    what: str
    why: str
    form: Form


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        leaf: of the tree.
        headline: the answer, in a sentence or two.
        steps: in order.
        ruled_out: what else there is, and why not.
    """

    leaf: Leaf
    headline: str
    steps: tuple[Step, ...]
    ruled_out: dict[str, str]
