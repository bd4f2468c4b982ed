"""The sizes that a plan is made of: two models, a batch, and how the ranks share the work."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer, in numbers of values.

    Attributes:
        parameters: all of them, a matrix shared by embedding and head counted once.
        trainable: those that want a gradient.
        embedding: of the input embedding.
        head: of the output projection; 0 where the features are the logits (a classifier).
        tied: whether the head is the embedding.
        head_trains: whether the head wants a gradient.
        layer: parameters of the largest layer.
        layers: how many there are.
        width: D, of the hidden states.
        queries: width of the queries of a layer, all heads together.
        keys: width of the keys and values of a layer together.
        heads: attention heads of a layer.
        inner: the widest matrix of a layer, mostly that of the feed-forward part.
        gated: whether the feed-forward part multiplies two projections (SwiGLU and its like).
        maps: whether attention keeps its `[T, T]` probabilities (the `eager` implementation does).
    """

    parameters: int
    trainable: int
    embedding: int
    head: int
    tied: bool
    head_trains: bool
    layer: int
    layers: int
    width: int
    queries: int
    keys: int
    heads: int
    inner: int
    gated: bool
    maps: bool = False


@dataclass(frozen=True)
class Job:
    """What one rank does in a step.

    Attributes:
        student: the model being trained.
        teacher: the frozen model, or None.
        batch: rows in a micro-batch.
        length: positions in a row.
        accumulate: micro-batches in a step.
        precision: of the trainer, e.g. `bf16-mixed`.
        checkpointing: whether only the inputs of layers are kept for the backward pass.
        teacher_bytes: per parameter of the teacher.
        teacher_sharded: whether each rank holds only its part of the teacher.
        unit: what a valid position is: `token`, or `sample` where a row has one label.
        classes: V.
        chunk: valid positions that the objective takes at a time.
        block: positions that it evaluates at a time inside a chunk.
        terms: token losses.
        norms: whether each term's gradient is measured.
        exact: terms whose gradient on the parameters a balancer measures now and then; 0 for none.
        own: parameters of the losses themselves, e.g. projectors.
        teacher_taps: widths of the teacher's activations that losses ask for, summed.
        compared: widths of what the losses on activations keep for the backward pass, summed.
        device: `cuda` or `cpu`.
    """

    student: Shape
    teacher: Shape | None
    batch: int
    length: int
    accumulate: int
    precision: str
    checkpointing: bool
    teacher_bytes: int
    unit: str
    classes: int
    chunk: int
    block: int
    terms: int
    norms: bool = False
    exact: int = 0
    own: int = 0
    teacher_taps: int = 0
    compared: int = 0
    teacher_sharded: bool = False
    device: str = "cuda"

    @property
    def positions(self) -> int:
        """Positions in a micro-batch."""
        return self.batch * self.length

    @property
    def valid(self) -> int:
        """Valid positions in a micro-batch, at most."""
        return self.positions if self.unit == "token" else self.batch

    @property
    def parameters(self) -> int:
        """What is in the LightningModule: the student and the losses' own."""
        return self.student.parameters + self.own

    @property
    def trainable(self) -> int:
        """What the optimizer has."""
        return self.student.trainable + self.own

    @property
    def compute(self) -> int:
        """Bytes of a value that matrix products compute in."""
        return 4 if self.precision.startswith("32") else 2

    @property
    def mixed(self) -> bool:
        """Whether weights stay in float32 and are cast for the matrix products."""
        return self.precision.endswith("mixed")

    @property
    def weight(self) -> int:
        """Bytes of a weight."""
        return 4 if self.mixed else self.compute

    def under(self, strategy: "Strategy") -> "Job":
        """The same job as a strategy runs it: DeepSpeed has no mixed precision but casts the whole model."""
        return replace(self, precision=self.precision.replace("mixed", "true")) if strategy.zero else self


@dataclass(frozen=True)
class Strategy:
    """How ranks share the student.

    Attributes:
        name: as the table shows it.
        zero: stage of DeepSpeed's ZeRO; 0 for none.
        fsdp: whether FSDP2 shards it.
        offload: whether the optimizer's states (and under ZeRO-3 the parameters) are in the host's memory.
        bucket: values in a reduction bucket; 2e8 is Lightning's default, 5e8 DeepSpeed's own.
        live: values that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`), and `stage3_max_reuse_distance`.
        sub_group: values that ZeRO-3 steps at a time.
    """

    name: str
    zero: int = 0
    fsdp: bool = False
    offload: bool = False
    bucket: int = 200_000_000
    live: int = 1_000_000_000
    sub_group: int = 1_000_000_000


REPLICATED = Strategy("DDP")
ALONE = Strategy("one process")
STRATEGIES = (
    REPLICATED,
    Strategy("ZeRO-1", zero=1),
    Strategy("ZeRO-2", zero=2),
    Strategy("ZeRO-3", zero=3),
    Strategy("ZeRO-3, offloaded", zero=3, offload=True),
    Strategy("FSDP2", fsdp=True),
)
