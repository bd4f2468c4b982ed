"""A finished run made by hand, for tests of what is reported of one: no training."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

from distill.report import rows
from distill.report.environment import environment
from distill.report.evidence import Against, Columns, Evidence, Observed, Subject
from distill.tasks import SequenceClassification
from tests import models

CPU = torch.device("cpu")
ROWS = 12
NOTHING = np.zeros((0, 2, 1), np.float32)


def column(correct: Any, labels: Any, nll: Any = None, kl: Any = None) -> Columns:
    """A model that is right where `correct` says so, and else takes the next class."""
    size, top = len(labels), np.where(np.asarray(correct, bool), labels, labels + 1)
    nll = np.ones(size) if nll is None else np.asarray(nll, float)
    against = None if kl is None else Against(*(np.asarray(kl, float) for _ in range(2)), *(np.zeros(size) for _ in range(3)))
    return Columns(nll, top, np.ones(size), np.zeros(size), np.zeros(size), against, None, NOTHING)


def observed(teacher: Any, student: Any, per_row: int = 1, **kwargs: Any) -> Observed:
    """A teacher and a student on the same rows, of so many positions each."""
    size = len(teacher)
    labels = np.arange(size, dtype=np.int64) % 3
    made = {"teacher": column(teacher, labels), "student distilled": column(student, labels, kl=np.full(size, 0.25), **kwargs)}
    return Observed(labels, np.arange(size) // per_row, np.zeros(0, np.int64), made, 1, 3, size // per_row)


def line(step: int, time: float, **values: Any) -> dict[str, Any]:
    """A line of the log; `a__b` is the key `a/b`."""
    return {"step": step, "time": time} | {key.replace("__", "/"): value for key, value in values.items()}


def log(steps: int = 40, val: bool = True) -> list[dict[str, Any]]:
    """A run of two terms that converges."""
    lines: list[dict[str, Any]] = []
    for step in range(9, steps, 10):
        kd, ce = 2.0 / (step + 1), 4.0 / (step + 1)
        terms = {"train/kd": kd, "train/ce": ce, "train/kd_weight": 0.75, "train/ce_weight": 0.25}
        terms |= {"train/kd_weighted": 0.75 * kd, "train/ce_weighted": 0.25 * ce, "train/kd_grad_norm": 1.0, "train/ce_grad_norm": 1.0}
        lines.append({"step": step, "time": 0.5 * (step + 1), "train/loss": 0.75 * kd + 0.25 * ce, "tokens_per_s": 100.0, **terms})
        if val:
            lines.append({"step": step, "time": 0.5 * (step + 1), "val/loss": 1.0 + 2.0 ** (-step), "val/teacher_loss": 0.9})
    return lines


def evidence(folder: Path, **changes: Any) -> Evidence:
    """Of a classifier: a teacher of four layers and a student of two, each with its folder."""
    made: dict[str, Any] = {"subjects": {}}
    for name, layers in (("teacher", 4), ("student distilled", 2)):
        model = models.classifier(num_hidden_layers=layers)
        home = folder / name
        models.save(model, home)
        made["subjects"][name] = Subject(partial(SequenceClassification().outputs, model), model, home)
    ids = models.tokens(ROWS, 6)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": torch.zeros(len(part), 1).long()} for part in ids.split(10)
    ]
    made |= {
        "folder": folder,
        "student": "student distilled",
        "task": SequenceClassification(),
        "data": SimpleNamespace(fingerprint="d" * 16),
        "device": CPU,
        "batches": batches,
        "observed": observed([1] * 10 + [0] * 2, [1] * 6 + [0] * 6),
        "run": {"steps": 40, "losses": {"kd": {}, "ce": {}}, "skipped_steps": 2, "fingerprints": CODE},
        "log": log(),
        "config": {"seed_everything": 3, "name": folder.name, "trainer": {"max_steps": 40, "num_nodes": 1}},
    }
    return Evidence(**(made | changes))


CODE = {"version": "9.9", "commit": "abc +", "code": "c" * 16, "data": "d" * 16}


def cost(accuracy: float, size: float, latency: float) -> dict[str, Any]:
    """A model's figures of the chapter on cost."""
    near = {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01}
    numbers = {
        "parameters": 1000,
        "nonzero": 1000,
        "bytes": size,
        "bytes_source": "files",
        "latency_ms": latency,
        "latency_p95_ms": latency,
    }
    return numbers | {
        "accuracy": near,
        "loss": near,
        "throughput": 1.0,
        "joules": 1.0,
        "peak_bytes": 1,
        "flops": 1,
        "energy_source": "RAPL",
    }


def finished(folder: Path, seen: Observed, config: dict[str, Any], teacher: str = "t", latency: float = 2.0) -> Path:
    """The folder of a run with its report."""
    folder.mkdir(parents=True)
    accuracy = float((seen.models["student distilled"].top == seen.labels).mean())
    sections = {
        "calibration": {"models": {"student distilled": {"ece": {"value": 0.04, "low": 0.03, "high": 0.05}}}},
        "fidelity": {"missing": "no teacher"},
        "cost": {"models": {"teacher": cost(0.9, 8e6, 4.0), "student distilled": cost(accuracy, 1e6, latency)}},
        "training": {"curves": {"val/loss": [[9, 19], [2.0, 1.0]]}, "end": {"says": "Validation loss had settled."}},
        "provenance": {"student": "student distilled", "weights": {"teacher": teacher}, "environment": environment()},
    }
    report = {"models": {"teacher": {}, "student distilled": {"accuracy": accuracy, "seconds": 12.0}}, "steps": 20, "sections": sections}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows.save(folder, seen)
    return folder
