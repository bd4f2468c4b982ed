"""What of a teacher's distribution teaches: all of it, its shape without its meaning, or its first class only.

    python scripts/experiments/make_long_tail.py --encoder FOLDER    # once: data and the teacher's logits
    python scripts/experiments/dark_knowledge.py

Every student sees the same texts of Banking77 in the same order, from the same initialisation of its seed, and no label but the arm's.
`shuffled` permutes the teacher's logits below the first among the classes, row by row: top-1, its probability and the entropy stay.
Trains what is not in `runs/` yet, and prints the table of the test set.
"""

import argparse
from pathlib import Path

from grid import TestSet, student_logits, table, train
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

CONFIG = "scripts/experiments/dark_knowledge.yaml"
DATA = Path("runs/experiments/data/banking77")
RUNS = Path("runs/experiments/dark_knowledge")
AT_ONE = "--model.losses.kd.temperature=1"
ARMS = {
    "labels": ["--alone=true"],
    "teacher": [],
    "teacher, shuffled": ["--model.teacher.below_top1=shuffle"],
    "teacher, hard": ["--model.teacher.below_top1=hard"],
    "teacher, T = 1": [AT_ONE],
    "teacher, shuffled, T = 1": [AT_ONE, "--model.teacher.below_top1=shuffle"],
    "teacher, hard, T = 1": [AT_ONE, "--model.teacher.below_top1=hard"],
}


def measure(logits_NV: Tensor, test: TestSet) -> dict[str, float]:
    """Share of the test rows whose class is the first, or among the first five."""
    return {f"top-{k}": float(multiclass_accuracy(logits_NV, test.labels, len(test.classes), average="micro", top_k=k)) for k in (1, 5)}


def slug(arm: str) -> str:
    """The name of an arm as part of a folder's."""
    return arm.replace(" = ", "").replace(", ", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}")
    args = parser.parse_args()
    test = TestSet.read(DATA)
    rows = {"the teacher itself": [measure(test.teacher, test)]}
    for arm in args.arms:
        rows[arm] = []
        for seed in args.seeds:
            folder = RUNS / f"{slug(arm)}-{seed}"
            train(folder, CONFIG, [f"--seed_everything={seed}", *ARMS[arm]])
            rows[arm].append(measure(student_logits(folder, test), test))
            print(f"{arm}, seed {seed}: {rows[arm][-1]}", flush=True)
    print(table(rows))
