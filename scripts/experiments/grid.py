"""What the experiments share: train the runs that are not there yet, put the students to the test set, write mean ± sd."""

import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill.cli import main


@dataclass(frozen=True)
class TestSet:
    """What students are measured on.

    Attributes:
        texts: of the test rows.
        labels: `[N]`, the class of each.
        classes: the names, sorted, as the data order them.
        train_counts: `[V]`, training rows of each class.
        teacher: `[N, V]`, the teacher's logits.
    """

    texts: list[str]
    labels: Tensor
    classes: list[str]
    train_counts: Tensor
    teacher: Tensor

    @classmethod
    def read(cls, folder: Path) -> "TestSet":
        """Read a folder that `make_long_tail.py` made."""
        train, test = (_rows(folder / f"{part}.jsonl") for part in ("train", "test"))
        counts = Counter(row["label"] for row in train)
        classes = sorted(counts)
        with np.load(folder / "teacher.npz") as file:
            if file["classes"].tolist() != classes:
                raise SystemExit(f"{folder}: the teacher knows other classes than the training rows; run make_long_tail.py again")
            teacher = torch.from_numpy(file["test"])
        labels = torch.tensor([classes.index(row["label"]) for row in test])
        return cls([row["text"] for row in test], labels, classes, torch.tensor([counts[name] for name in classes]), teacher)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(folder: Path, config: str, args: Sequence[str]) -> None:
    """Train a run unless its report is there; what an interrupted run left is removed and begun again."""
    if (folder / "report.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    if main(["fit", "--config", config, f"--runs={folder.parent}", f"--name={folder.name}", "--report_rows=0", *args]) != 0:
        raise SystemExit(f"the run {folder} failed")
    print(f"{folder}: {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def student_logits(folder: Path, test: TestSet, batch: int = 256) -> Tensor:
    """The student's logits of the test rows, `[N, V]`, through plain transformers; kept in the run's folder."""
    kept = folder / "test_logits.npy"
    if not kept.is_file():
        model = AutoModelForSequenceClassification.from_pretrained(folder / "student").eval()
        if [model.config.id2label[i] for i in range(model.config.num_labels)] != test.classes:
            raise SystemExit(f"{folder}: the student orders the classes differently; remove the run and train it again")
        tokenizer = AutoTokenizer.from_pretrained(folder / "student")
        length = max_length(folder)
        order = sorted(range(len(test.texts)), key=lambda i: len(test.texts[i]))  # short beside short: less padding
        found = np.zeros((len(order), len(test.classes)), np.float32)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            texts = [test.texts[i] for i in rows]
            inputs = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
            found[rows] = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.numpy()
        np.save(kept, found)
    return torch.from_numpy(np.load(kept))


def max_length(folder: Path) -> int:
    """The tokens of a text that the run kept."""
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    length: int = config["data"]["init_args"]["max_length"]
    return length


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table: an arm a row, a measure a column, mean ± sample standard deviation over the seeds, in percent."""
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| arm | seeds | {' | '.join(columns)} |", "|---|--:|" + "--:|" * len(columns)]
    for arm, seeds in rows.items():
        cells = [spread([seed[column] for seed in seeds]) for column in columns]
        lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of shares, in percent; a single one stands alone."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
