"""What `distill cost` does: teacher, student and exports of a run, side by side: quality, size, latency, throughput, memory, energy."""

import itertools
import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from distill.data.base import DistillData
from distill.export.base import Run
from distill.export.driver import all_formats
from distill.export.subjects import loaded
from distill.losses.measure import measure
from distill.module import DistillModule
from distill.report import tables
from distill.report.costs import cost
from distill.report.costs.served import logits_of
from distill.report.files import write_json
from distill.teachers.online import OnlineTeacher
from distill.teachers.several import teachers_of
from distill.types import Batch, ConfigError, Outputs

CPU = torch.device("cpu")
Candidates = dict[str, cost.Candidate]
WIDTH = 13  # of a line of a name in the table, so that the figures have room


def show(module: DistillModule, data: DistillData, config: Any) -> None:
    """Measure, print, and write `cost.json` beside the student.

    Args:
        module: as the YAML makes it; its teacher is loaded, where it has one that is there.
        data: the same; nothing is read yet.
        config: the resolved configuration, with the keys of the verb.

    Raises:
        ConfigError: there is no student, or too few rows.
    """
    folder = Path(config.runs) / (config.name or "")
    if config.name is None or not (folder / "student").is_dir():
        raise ConfigError(f"cost: there is no student in '{folder / 'student'}'; train it first, and give --config runs/NAME/config.yaml")
    if config.rounds < 2:
        raise ConfigError("cost: rounds must be at least 2, got 1; one time says nothing")
    data.setup()
    batches = _rows(data, config.rows)
    first = batches[0]
    if len(first["input_ids"]) < config.batch:
        raise ConfigError(f"cost: batch is {config.batch}, but a batch of validation rows has {len(first['input_ids'])}; lower one")
    one, many = ({name: value[:size] for name, value in first.items() if value.ndim} for size in (1, config.batch))
    with torch.inference_mode():
        timed, untimed = candidates(module, data, folder, one)
        costs = cost.measure(timed, one, many, config.rounds)
        qualities = {name: quality(each.run, batches, data.num_classes) for name, each in (timed | untimed).items()}
    figures = {name: each.as_dict() for name, each in costs.items()} | {name: cost.of_files(each.files) for name, each in untimed.items()}
    rows = {name: {**qualities[name], **figures[name]} for name in figures}
    write_json(folder / "cost.json", {"batch": config.batch, "device": CPU.type, "threads": torch.get_num_threads(), "models": rows})
    tables.show(table(rows, config.batch, data.task().unit, torch.get_num_threads()))
    print(f"{next(iter(costs.values())).energy_source}; operations as torch counts them; figures are in {folder / 'cost.json'}")


def candidates(module: DistillModule, data: DistillData, folder: Path, one: Batch) -> tuple[Candidates, Candidates]:
    """Load the teacher, the student, and what `distill export` has left of it; what does not load, or run, is named.

    Returns:
        Those to time, and those whose runtime is not here, see `Format.runtime`.
    """
    task, found, absent = data.task(), {}, dict[str, str]()
    teachers = [] if module.teacher is None else teachers_of(module.teacher)
    for number, teacher in enumerate(teachers, start=1):
        if not isinstance(teacher, OnlineTeacher):
            print(f"The teacher is {teacher.name}, no model in this process: it is not measured")
        elif teacher.recipe_needed() is None:
            teacher.setup(task, CPU, torch.float32)
            teacher.check(data.tokenizer, data.model_config())  # which also says what its padding is
            (model,) = teacher.models()
            found["teacher" if len(teachers) == 1 else f"teacher {number}"] = _of_model(model, Path(teacher.name))
    found["student"] = _of_model(task.load(str(folder / "student"), "student", dtype=torch.float32).eval(), folder / "student")
    exports = loaded(folder, task, one, absent)
    for name, why in absent.items():
        print(f"{name} is not measured: {why}")
    found |= {name: cost.Candidate(each.run, None, each.files) for name, each in exports.items()}
    untimed = {name: found.pop(name) for name, each in exports.items() if all_formats()[each.format].runtime}
    return found, untimed


def _of_model(model: Any, files: Path) -> cost.Candidate:
    return cost.Candidate(partial(logits_of, model), model, files if files.exists() else None)


def _rows(data: DistillData, count: int) -> list[Batch]:
    loader: Iterable[Batch] = data.val_dataloader() or data.train_dataloader()
    return list(itertools.islice(loader, max(1, -(-count // data.batch_size))))


def quality(run: Run, batches: Iterable[Batch], num_classes: int) -> dict[str, float]:
    """Loss in nats and top-1 accuracy over the valid positions of some rows, each served as it comes.

    Args:
        run: gives logits `[B, T, V]` or `[B, V]`.
        batches: with labels.
        num_classes: V of the data; padding columns beyond it are left out.
    """
    total: dict[str, float] = {}
    for batch in batches:
        logits = run(batch)
        outputs = Outputs(logits if logits.ndim == 3 else logits[:, None], nn.Identity())
        for name, value in measure(outputs, None, batch["labels"], num_classes).items():
            total[name] = total.get(name, 0.0) + float(value)
    return {name: total[name] / max(1.0, total["count"]) for name in ("loss", "accuracy")}


def table(rows: dict[str, dict[str, Any]], batch: int, unit: str, threads: int) -> Table:
    """One row a model; cells of what was not measured are empty, and a line under the table says why."""
    title = f"Cost on the CPU, {threads} thread{'' if threads == 1 else 's'}, timed in turn; quality per {unit}"
    shown = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    if any(row["latency_ms"] is None for row in rows.values()):
        formats = ", ".join(f"{name} is for {runtime}" for name, each in all_formats().items() if (runtime := each.runtime))
        shown.caption = f"† not timed: {formats}, which is not run here; its quality is that of the dequantised weights in PyTorch"
    shown.add_column("", no_wrap=True)
    for head in ("loss", "accuracy", "params", "MB", "ms", "p95", f"/s at {batch}", "peak MB", "J per 1k", "GFLOP"):
        shown.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        shown.add_row(
            textwrap.fill(f"{name} †" if row["latency_ms"] is None else name, WIDTH),
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.1%}",
            "" if row["nonzero"] is None else f"{row['nonzero'] / 1e6:.2f}M" + ("*" if row["nonzero"] < row["parameters"] else ""),
            _cell(row["disk_bytes"], 2, 1e-6),
            _cell(row["latency_ms"], 2),
            _cell(row["latency_p95_ms"], 2),
            _cell(row["throughput"], 0),
            _cell(row["peak_bytes"], 1, 1e-6),
            _cell(row["joules"], 1),
            _cell(row["flops"], 3, 1e-9),
        )
    return shown


def _cell(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"
