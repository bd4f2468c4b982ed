"""What `distill export` does."""

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.compress.ptq import ptq
from distill.data.base import DistillData
from distill.export import record
from distill.export.base import Source
from distill.export.driver import Exported, export, parse
from distill.export.grid import grids_of
from distill.export.subjects import home_of
from distill.tasks import Task
from distill.types import Batch, ConfigError


def export_student(data: DistillData, config: Any) -> list[Exported]:
    """Export a student.

    Args:
        data: as the YAML makes it; nothing is read yet.
        config: the resolved configuration, with the keys of the verb.

    Raises:
        ConfigError: there is no student, a format cannot store it, or a key is without the one that it is for.
        ExportError: see `driver.export`.
    """
    formats = parse([config.format] if isinstance(config.format, str) else config.format, config.precision)
    if config.group_size is not None and config.ptq is None:
        raise ConfigError(
            f"group_size: {config.group_size} is for --ptq, and there is none; add --ptq, e.g. --ptq=int4, or leave --group_size out"
        )
    run = Path(config.runs) / (config.name or "")
    if config.name is None and None in (config.student, config.out):
        raise ConfigError("export: which student? Give --config runs/NAME/config.yaml, or --name NAME, or --student and --out")
    folder = Path(config.student) if config.student else run / "student"
    if not folder.is_dir():
        raise ConfigError(f"export: there is no student in '{folder}'; train it first, or give its folder as --student")
    made_of = {record.STUDENT: record.sha256_of(folder), "ptq": config.ptq, "group_size": config.group_size}
    student = _load(data.task(), folder)
    grids = grids_of(student)  # in the dtype it was saved in
    student.float()
    data.setup()
    batches = _rows(data, config.rows)
    source = Source(student, data.tokenizer, data.task(), lambda: batches, grids)
    reference = None
    if config.ptq:
        if grids:
            raise ConfigError(
                f"ptq: '{folder}' was quantised in training already; leave --ptq out, or take the student of a run without it"
            )
        reference, model = student, ptq(student, config.ptq, config.group_size)
        source = Source(model, data.tokenizer, data.task(), lambda: batches, grids_of(model))
    out = Path(config.out) if config.out else home_of(run, config.ptq, config.group_size)
    return export(source, formats, out, reference, config.tolerance, made_of)


def _load(task: Task, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = task.load(str(folder), "student", dtype="auto").eval()
    return model.requires_grad_(False)


def _rows(data: DistillData, count: int) -> list[Batch]:
    """The first training batches of the run's own order; fewer than a batch of rows is one smaller batch."""
    if len(data.train_set) < data.batch_size:
        return [data.collator()([data.train_set[i] for i in range(len(data.train_set))])]
    with torch.random.fork_rng():
        return list(itertools.islice(data.train_dataloader(), max(1, -(-count // data.batch_size))))
