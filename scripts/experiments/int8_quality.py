"""What int8 costs a trained encoder: test accuracy of the float student and of its int8 exports, for runs of movement.py.

    python scripts/experiments/movement.py --encoder … --sparsities 0       # the students
    python scripts/experiments/int8_quality.py runs/experiments/movement/dense-*

Exports each run's student unless the export is there, puts all of them to the 3,080 test texts of Banking77, and prints a Markdown table:
percent right, and the difference in points, mean ± sd over the runs.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev

import torch
from grid import TestSet, max_length, student_logits
from movement import DATA
from torch import Tensor
from transformers import AutoTokenizer

from distill.cli import main
from distill.export.driver import all_formats
from distill.tasks import SequenceClassification

FORMATS = ("onnx-int8", "onnx-int8-static", "openvino-int8")


def accuracy(run: Callable[[Mapping[str, Tensor]], Tensor], folder: Path, test: TestSet, batch: int = 64) -> float:
    """The share of the test rows whose class comes first."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    right = 0
    for start in range(0, len(test.texts), batch):
        texts = test.texts[start : start + batch]
        inputs = tokenizer(texts, truncation=True, max_length=max_length(folder), padding=True, return_tensors="pt")
        right += int((run(inputs).argmax(-1) == test.labels[start : start + batch]).sum())
    return right / len(test.texts)


def measured(folder: Path, test: TestSet) -> dict[str, float]:
    """Accuracy of a run's student and of its exports."""
    found = {"float32, PyTorch": float((student_logits(folder, test).argmax(1) == test.labels).float().mean())}
    for export in FORMATS:
        name, _, precision = export.partition("-")
        at = folder / "export" / export
        if not at.is_dir() and main(["export", "--config", str(folder / "config.yaml"), "--format", f"{name}:{precision}"]):
            raise SystemExit(f"{folder} cannot be exported to {export}")
        found[export] = accuracy(all_formats()[name](precision).load(at, SequenceClassification()), folder, test)
    return found


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):+.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = TestSet.read(DATA)
    rows = [measured(folder, test) for folder in args.runs]
    print("| model | runs | percent right | points lost to int8 |\n|---|--:|--:|--:|")
    for name in rows[0]:
        right, lost = [100 * row[name] for row in rows], [100 * (row["float32, PyTorch"] - row[name]) for row in rows]
        print(f"| {name} | {len(rows)} | {spread(right, 2).lstrip('+')} | {spread(lost, 2)} |")
