"""Distillation on imbalanced classes: which term helps the rare ones, and at what cost to the frequent ones.

    python scripts/experiments/make_long_tail.py --encoder FOLDER    # once: data and the teacher's logits
    python scripts/experiments/long_tail.py

Two sets: GoEmotions with its own long tail, and Banking77 cut to one. Every arm sees the same texts in the same order, from the same
initialisation of its seed. Trains what is not in `runs/` yet, and prints a table of the test set for each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from grid import TestSet, student_logits, table, train
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

CONFIG = "scripts/experiments/long_tail.yaml"
DATA = Path("runs/experiments/data")
RUNS = Path("runs/experiments/long_tail")
STEPS = {"banking77_tail": 400, "goemotions": 600}


def of_class(name: str, **init_args: Any) -> dict[str, Any]:
    """Name a class as in YAML."""
    return {"class_path": name, "init_args": init_args}


CE, KL = of_class("CrossEntropy"), of_class("ForwardKL", temperature=1.0)
BALANCED = of_class("FrequencyPower", gamma=1.0, cap=10.0)
WEIGHTED_CE = of_class("ClassWeighted", term=CE, class_weights=BALANCED)
ARMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "CE": (["--alone=true"], {"ce": CE, "kd": KL}),
    "weighted CE": (["--alone=true"], {"ce": WEIGHTED_CE, "kd": KL}),
    "CE + KD": ([], {"ce": CE, "kd": KL}),
    "weighted CE + KD": ([], {"ce": WEIGHTED_CE, "kd": KL}),
    "weighted CE + weighted KD": ([], {"ce": WEIGHTED_CE, "kd": of_class("ClassWeighted", term=KL, class_weights=BALANCED)}),
    "CE + BalancedKD": ([], {"ce": CE, "kd": of_class("BalancedKD", temperature=1.0)}),
    "CE + LTKD": ([], {"ce": CE, "kd": of_class("LTKD", temperature=1.0)}),
}


def rare(counts_V: Tensor) -> Tensor:
    """The third of the classes with the fewest training rows, `[V // 3]`; of equals the later."""
    return counts_V.argsort(descending=True, stable=True)[-(len(counts_V) // 3) :]


def measure(logits_NV: Tensor, test: TestSet) -> dict[str, float]:
    """Measures of the test rows, as shares.

    `accuracy`; `macro`, the mean recall of the classes; `rare`, the same of the rare third; `ECE, rare`, the expected calibration error
    (15 bins) on the rows whose true class is in the rare third.
    """
    classes = len(test.classes)
    few = rare(test.train_counts)
    recall = multiclass_accuracy(logits_NV, test.labels, classes, average="none")
    rows = torch.isin(test.labels, few)
    return {
        "accuracy": float(multiclass_accuracy(logits_NV, test.labels, classes, average="micro")),
        "macro": float(recall.mean()),
        "rare": float(recall[few].mean()),
        "ECE, rare": float(multiclass_calibration_error(logits_NV[rows].softmax(-1), test.labels[rows], classes)),
    }


def overrides(dataset: str, arm: str, seed: int) -> list[str]:
    """What the command line says beside the config."""
    flags, losses = ARMS[arm]
    folder = DATA / dataset
    return [
        f"--seed_everything={seed}",
        f"--model.teacher.folder={folder}",
        f"--data.train_data={folder / 'train.jsonl'}",
        f"--data.val_data={folder / 'val.jsonl'}",
        f"--data.tokenizer={folder / 'tokenizer'}",
        f"--trainer.max_steps={STEPS[dataset]}",
        f"--model.losses={json.dumps(losses)}",
        *flags,
    ]


def one_set(dataset: str, arms: list[str], seeds: list[int]) -> str:
    """Train and measure every arm with every seed, and give the table."""
    test = TestSet.read(DATA / dataset)
    rows = {"the teacher itself": [measure(test.teacher, test)]}
    for arm in arms:
        rows[arm] = []
        for seed in seeds:
            folder = RUNS / f"{dataset}-{arm.replace(' + ', '+').replace(' ', '_')}-{seed}"
            train(folder, CONFIG, overrides(dataset, arm, seed))
            rows[arm].append(measure(student_logits(folder, test), test))
            print(f"{dataset}, {arm}, seed {seed}: {rows[arm][-1]}", flush=True)
    return table(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}")
    args = parser.parse_args()
    for text in [f"\n{name}\n\n{one_set(name, args.arms, args.seeds)}" for name in args.sets]:
        print(text)
