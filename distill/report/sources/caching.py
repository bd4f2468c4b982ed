"""Writing a store: the teacher is asked about every training row once, shard by shard, on any number of ranks."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from distill.checks import check_length, check_packing
from distill.data.base import DistillData
from distill.data.loader import EvalLoader
from distill.losses.base import Loss
from distill.losses.measure import measure
from distill.module import DistillModule
from distill.objective import check_support
from distill.report import fingerprint, tables
from distill.report.progress import Progress
from distill.report.sources.situation import temperatures
from distill.report.sources.targets import stored_rows
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher, vocabulary_hash
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from distill.teachers.padded import places
from distill.teachers.shape import config_values
from distill.teachers.store import (
    Header,
    Manifest,
    StoredRow,
    create,
    finish,
    finished,
    finished_shards,
    read_header,
    verify,
    write_shard,
)
from distill.types import IGNORE_INDEX, Batch, ConfigError, MixedTarget, Target

SHARD_BYTES = 2**28  # about; a rank holds as much in memory, and a kill loses as much
SHARDS = 64  # at least, where there are rows enough: ranks share them out


@dataclass(frozen=True)
class Job:
    """A store that is to be written by this rank and its peers.

    Attributes:
        cached: says where, and what is kept.
        source: the teacher that is asked, ready.
        data: read.
        fabric: launched.
        batch_size: rows that the teacher takes at a time.
    """

    cached: CachedTeacher
    source: Teacher
    data: DistillData
    fabric: Fabric
    batch_size: int


def ready(module: DistillModule, cached: CachedTeacher, source: Teacher, data: DistillData, dtype: torch.dtype, fabric: Fabric) -> None:
    """Load the data and the teacher on every rank, and look at both as training would.

    Args:
        module: whose terms the store must serve.
        cached: not set up.
        source: the same; nothing is loaded yet.
        data: not read.
        dtype: the compute dtype of the trainer.
        fabric: launched.

    Raises:
        ConfigError: what training would say of them; a term that the store is not right for.
    """
    with fabric.rank_zero_first(local=True):  # what is made of files is found by the others
        data.setup()
    task = data.task()
    check_support(module.terms, cached.support)
    for name, term in module.terms.items():
        if others := sorted(temperatures([term]) - {cached.T}):
            raise ConfigError(
                f"model.losses.{name}.temperature is {' and '.join(f'{T:g}' for T in others)}, but model.teacher.temperature is "
                f"{cached.T:g}; they must agree from the first step to the last"
            )
    if isinstance(source, SelfTeacher):
        raise ConfigError(
            "model.teacher.source: SelfTeacher is the student without its adapters, and here there is no student; take OnlineTeacher with "
            "the checkpoint that the adapters go on"
        )
    source.setup(task, fabric.device, dtype)
    if source.support != "classes":
        raise ConfigError(f"model.teacher.source: {type(source).__name__} does not know all classes, of which the store would keep some")
    if isinstance(source, OnlineTeacher) and source.sharded:
        raise ConfigError(
            "model.teacher.source.sharded is for ranks that run it together, but here each writes rows of its own; set sharded: false "
            "(quantize and offload need less memory, too)"
        )
    source.check(data.tokenizer, data.model_config())
    source.check_routes(data.routes)
    cached.shape = source.structure()
    if cached.shape is not None:
        check_length(cached.shape, data.max_length, "model.teacher.source")
    for model in source.models() if data.pack else []:
        check_packing(task, model, "model.teacher.source")


def taps_of(module: DistillModule, cached: CachedTeacher, data: DistillData) -> list[str]:
    """Which hidden states of the teacher the terms want: to know it, the student is made, and let go again.

    Args:
        module: with the terms.
        cached: knows the teacher's layers.
        data: read.
    """
    if not any(isinstance(term, Loss) and term.needs_teacher for term in module.terms.values()):
        return []
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.trainer = pl.Trainer(accelerator="cpu", devices=1, plugins=[LightningEnvironment()], **quiet)
    module.trainer.datamodule = data  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
    module.teacher, module.task, module.expected = cached, data.task(), data.model_config()
    module.configure_model()
    module.student = None
    return sorted({tap for term in module.terms.values() if isinstance(term, Loss) for tap in term.teacher_taps})


def write(job: Job, taps: list[str], rows_per_shard: int | None = None) -> None:
    """Write what is missing of the store, and say how large it is.

    Args:
        job: the same on every rank.
        taps: the hidden states to keep.
        rows_per_shard: None chooses.

    Raises:
        ConfigError: the folder holds another store.
        DataError: the disk refuses; finished shards are kept.
    """
    fabric, folder = job.fabric, job.cached.folder
    start, header = time.perf_counter(), header_of(job, taps, rows_per_shard)
    missing: list[int] = []
    if fabric.is_global_zero:
        create(folder, header, job.data.class_counts().numpy())
        missing = missing_shards(folder, header)
    missing = fabric.broadcast(missing)
    read_header(folder).refuse_other(asdict(header), folder)  # where the ranks do not hold the same teacher
    if not missing and finished(folder) is not None:
        if fabric.is_global_zero:
            print(f"The store {folder} is whole: all its {header.num_shards} shards are there, nothing to do", flush=True)
        return
    mine = missing[fabric.global_rank :: fabric.world_size]
    with Progress(header, mine, fabric.is_global_zero) as progress:
        for shard in mine:
            progress.written(_write_shard(job, header, shard, taps, progress))
    fabric.barrier()
    measures = finished(folder) or _measures(job)
    if fabric.is_global_zero:
        finish(folder, measures)
        tables.show(tables.banner(f"Store {folder}", summary(folder, header, len(missing), time.perf_counter() - start)))
    fabric.barrier()


def missing_shards(folder: Path, header: Header) -> list[int]:
    """The shards that are to be written; of a finished store every byte is looked at, so that one that has gone bad is made again."""
    if finished(folder) is not None:
        return [index for index, _ in verify(folder)]
    return sorted(set(range(header.num_shards)) - set(finished_shards(folder)))


def header_of(job: Job, taps: list[str], rows_per_shard: int | None) -> Header:
    """Say what the store will hold; the same on every rank and at every start."""
    cached, data, rows = job.cached, job.data, len(job.data.train_set)
    asked = _ask(job, _batch(job, range(1)), taps)
    hidden = {name: tap.shape[-1] for name, tap in asked.taps.items()}
    per_row = data.max_length * (64 + sum(hidden.values()))
    fitting = min(SHARD_BYTES // per_row, -(-rows // SHARDS))
    models = job.source.models()
    return Header(
        **cached.wanted(),
        weights=fingerprint.weights(models) if models else "",
        tokenizer=vocabulary_hash(data.tokenizer),
        num_classes=data.num_classes,
        data=data.fingerprint,
        rows=rows,
        rows_per_shard=rows_per_shard or max(job.batch_size, fitting),
        hidden=hidden,
        config={} if cached.shape is None else config_values(cached.shape),
        described={**job.source.describe(), "seed": cached.seed, "batch_size": job.batch_size},
    )


def _batch(job: Job, numbers: range) -> Batch:
    rows: Any = job.data.train_set.__getitems__(list(numbers))
    return job.data.collator()(rows)


def _ask(job: Job, batch: Batch, taps: list[str]) -> Target:
    with job.fabric.autocast(), torch.no_grad():
        target = job.source(job.fabric.to_device(batch), taps)
    for name, tap in target.taps.items():
        if tap.ndim != 3:
            raise ConfigError(f"model.losses want '{name}' of the teacher, of shape {list(tap.shape)}; a store keeps hidden states alone")
    return target


def _write_shard(job: Job, header: Header, shard: int, taps: list[str], progress: Progress) -> Manifest:
    """Write a shard. Batches begin anew with it, so that its bytes are the same whoever writes it when."""
    numbers = header.rows_of(shard)
    firsts = range(numbers.start, numbers.stop, job.batch_size)
    batches = [_batch(job, range(first, min(first + job.batch_size, numbers.stop))) for first in firsts]
    where = [places(batch) for batch in batches]

    def rows() -> Iterator[StoredRow]:
        for batch, each in zip(batches, where, strict=True):
            target = _ask(job, batch, taps)
            for row in stored_rows(target, each, job.data.num_classes, job.cached, job.fabric.device):
                yield row
                progress.row()

    return write_shard(job.cached.folder, shard, [key for each in where for key in each.keys], rows(), header)


def _measures(job: Job) -> dict[str, float]:
    """The teacher's loss in nats and accuracy on validation and test rows, by `val/loss` and so on; shared out over the ranks."""
    found: dict[str, float] = {}
    for name, rows in (("val", job.data.val_set), ("test", job.data.test_set)):
        if rows is None:
            continue
        sums = torch.zeros(3, dtype=torch.float64)
        place = job.data.val_batch_size, job.fabric.global_rank, job.fabric.world_size, job.data.num_workers
        for batch in EvalLoader(rows, job.data.collator(), *place):
            sums += _measured(job, job.fabric.to_device(batch))
        total: Any = job.fabric.all_reduce(sums, reduce_op="sum")
        count, loss, accuracy = total.tolist()
        found |= {f"{name}/count": count, f"{name}/loss": loss / max(1, count), f"{name}/accuracy": accuracy / max(1, count)}
    return found


def _measured(job: Job, batch: Batch) -> Tensor:
    if not (batch["labels"] != IGNORE_INDEX).any():  # it only makes the ranks' numbers of batches equal; a mix may be of no teacher here
        return torch.zeros(3, dtype=torch.float64)
    target = _ask(job, batch, [])
    one: Any = target.parts[0] if isinstance(target, MixedTarget) else target  # something to measure the target beside
    with job.fabric.autocast():
        sums = measure(one, target, batch["labels"], job.data.num_classes)
    return torch.stack([sums["count"], sums["teacher_loss"], sums["teacher_accuracy"]]).cpu()


def summary(folder: Path, header: Header, written: int, seconds: float) -> dict[str, str]:
    """The rows of the table at the end."""
    shards = finished_shards(folder).values()
    positions, size = sum(shard.positions for shard in shards), sum(shard.bytes for shard in shards)
    states = f", with hidden states of {sum(header.hidden.values()):,} values" if header.hidden else ""
    return {
        "teacher": header.teacher,
        "rows": f"{header.rows:,}",
        "positions with a label": f"{positions:,}",
        "size": f"{size / 1e6:,.1f} MB in {header.num_shards} shards, {written} of them written now",
        "bytes per position": f"{size / max(1, positions):,.1f}{states}",
        "time": f"{seconds:,.0f} s",
    }
