"""The plan as tables: memory by strategy, communication, speed."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from distill.plan import communication
from distill.plan.job import ALONE, STRATEGIES, Job, Strategy
from distill.plan.memory import Memory, memory
from distill.plan.speed import Speed

GB, MB = 1e9, 1e6
ROOM = 0.9  # of a card: the rest is the CUDA context, NCCL's buffers and the allocator's gaps

# What a person writes as trainer.strategy, and the row it means; Lightning's own names too
NAMES = {
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offloaded",
    "deepspeed_stage_1": "ZeRO-1",
    "deepspeed_stage_2": "ZeRO-2",
    "deepspeed_stage_3": "ZeRO-3",
    "deepspeed_stage_3_offload": "ZeRO-3, offloaded",
    "ModelParallelStrategy": "FSDP2",
    "fsdp2": "FSDP2",
}


@dataclass(frozen=True)
class Cluster:
    """What the job will run on.

    Attributes:
        nodes: machines.
        gpus: devices of each.
        memory_gb: of a device, in 10^9 bytes.
        bandwidth_gb: that a device can send, in 10^9 bytes a second.
    """

    nodes: int
    gpus: int
    memory_gb: float
    bandwidth_gb: float

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.nodes * self.gpus


def strategies(ranks: int) -> tuple[Strategy, ...]:
    """The rows: on one device nothing is shared, and what remains is offloading."""
    return STRATEGIES if ranks > 1 else (ALONE, *(s for s in STRATEGIES if s.offload))


def named(strategy: str, ranks: int) -> str:
    """The row that `trainer.strategy` means."""
    return NAMES.get(strategy.rpartition(".")[2], strategies(ranks)[0].name)


def fits(found: Memory, cluster: Cluster) -> bool:
    """Whether the peak leaves a tenth of the device to what is not counted."""
    return found.peak <= ROOM * cluster.memory_gb * GB


def memory_table(job: Job, cluster: Cluster, configured: str) -> Table:
    """One row a strategy: GB by part, the peak and when it is, and whether it fits; `configured` is marked."""
    found = {strategy.name: memory(job, strategy, cluster.ranks) for strategy in strategies(cluster.ranks)}
    unit = _unit(m.peak for m in found.values())
    where = f"{cluster.ranks} ranks of {cluster.memory_gb:g} GB, {ROOM:.0%} of them to be used"
    table = _table(f"Memory per rank in {unit}, estimated · {where}")
    for head in ("param", "grad", "optim", "activ", "logits", "feat", "teacher", "buffer", "peak"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("at", "host", "fits"):
        table.add_column(head, no_wrap=True)
    for name, m in found.items():
        parts = m.parameters, m.gradients, m.optimizer, m.activations, m.logits, m.features, m.teacher, m.buffers, m.peak
        mark = "▸ " if name == named(configured, cluster.ranks) else "  "
        host = _in(unit, m.host * cluster.gpus) if m.host else ""
        table.add_row(mark + name, *(_in(unit, part) for part in parts), m.moment, host, "yes" if fits(m, cluster) else "NO")
    return table


def communication_table(job: Job, cluster: Cluster) -> Table:
    """One row a strategy: GB that a rank sends in a step, by collective, and the seconds if nothing hides them."""
    found = {}
    for strategy in strategies(cluster.ranks):
        whole = communication.collectives(job.under(strategy), strategy)
        kinds = ("all_reduce", "all_gather", "reduce_scatter")
        found[strategy.name] = [communication.sent(kind, whole.get(kind, 0), cluster.ranks) for kind in kinds]
    unit = _unit(sum(each) for each in found.values())
    table = _table(f"Sent per rank and step in {unit}, estimated · seconds: at {cluster.bandwidth_gb:g} GB/s")
    for head in ("all-reduce", "all-gather", "reduce-scatter", "sum", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, each in found.items():
        table.add_row("  " + name, *(_in(unit, part) for part in [*each, sum(each)]), f"{sum(each) / GB / cluster.bandwidth_gb:.3g}")
    return table


def rows(job: Job, cluster: Cluster, speed: Speed, steps: int | None) -> dict[str, str]:
    """What is planned, and how fast it goes."""
    how = "measured" if speed.measured else "estimated"
    tokens = job.positions * job.accumulate * cluster.ranks
    teacher = "none" if job.teacher is None else f"{job.teacher.parameters:,} parameters × {job.teacher_bytes} bytes"
    shared = f" · 1/{cluster.ranks} on each rank" if job.teacher_sharded else ""
    return {
        "student": f"{job.student.parameters:,} parameters · {job.student.trainable:,} trained"
        + (f" · {job.own:,} of the losses themselves" if job.own else ""),
        "teacher": teacher + shared,
        "precision": job.precision + (" · gradient checkpointing" if job.checkpointing else ""),
        "ranks": f"{cluster.nodes} nodes × {cluster.gpus}",
        "tokens per step": f"{tokens:,} = {job.batch} rows × {job.length} × {job.accumulate} accumulated × {cluster.ranks} ranks",
        "tokens/s": f"{speed.tokens_per_s:,.0f} {how}: {speed.basis}",
        "hours": "unknown: set trainer.max_steps" if speed.hours is None else f"{speed.hours:,.2f} {how} · {steps:,} steps",
    }


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    return table


def _unit(sizes: Iterable[float]) -> str:
    return "GB" if max(sizes) >= GB else "MB"


def _in(unit: str, size: float) -> str:
    return f"{size / {'GB': GB, 'MB': MB}[unit]:.2f}" if size else "0"
