"""Students of equal size, new or cut out of the teacher in several ways, all distilled alike: 40 % of a 4-layer Llama's parameters.

    python scripts/experiments/shrink.py                          # trains the teacher of configs/teacher_llama.yaml first, once
    python scripts/experiments/shrink.py --seeds 0 --steps 4      # a look at whether it runs

Every arm has the same terms, the same texts in the same order, and each learning rate that is asked for, on the first seed; the other seeds
have the rate whose held-out loss was lowest. Trains what is not in `runs/` yet, prints held-out figures of every arm, mean ± sd over the
seeds, and leaves them in `results.json`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from grid import train

CONFIG = "kd_llama_minitron.yaml"
TEACHER = "runs/teacher_llama/student"
RUNS = Path("runs/experiments/shrink")
TARGET = 0.4
# What `target: 0.4` gives by width, so that the new student has as many parameters and the same shape
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 112,
    "intermediate_size": 328,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.094,  # 1/√112
    "tie_word_embeddings": True,
}


def shrunk(**options: Any) -> dict[str, Any]:
    return {"class_path": "Shrunk", "init_args": {"model": TEACHER, "target": TARGET, **options}}


def low_rank(**options: Any) -> dict[str, Any]:
    base = {"class_path": "Pretrained", "init_args": {"model": TEACHER}}
    return {"class_path": "LowRank", "init_args": {"base": base, "target": TARGET, **options}}


ARMS: dict[str, dict[str, Any]] = {
    "new, of the same size": {"class_path": "FromConfig", "init_args": {"config": SIZES}},
    "width, by activation": shrunk(),
    "width, by weights": shrunk(importance="weights"),
    "every other layer, then width": shrunk(layers="every_other"),
    "3 layers by importance, then width": shrunk(layers=3, layer_choice="importance"),
    "low rank": low_rank(),
    "low rank, by activation": low_rank(activation_aware=True),
}


def figures(folder: Path) -> dict[str, float]:
    """The student's held-out figures, before and after."""
    models = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]
    after = models["student distilled"]
    return {
        "parameters": after["parameters"],
        "loss before": models["student before"]["loss"],
        "loss": after["loss"],
        "KL to the teacher": after["kl"],
        "same top-1": after["agreement"],
    }


def one(number: int, student: Mapping[str, Any], lr: float, seed: int, steps: int) -> dict[str, float]:
    """Train a student; give its figures."""
    folder = RUNS / f"arm{number}-lr{lr:g}-{steps}-{seed}"
    options = [f"--seed_everything={seed}", f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false"]
    options += [f"--model.student={json.dumps(student)}", f"--model.optimizer.lr={lr}", "--trainer.val_check_interval=1000000"]
    train(folder, CONFIG, options)
    return figures(folder)


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in rows[0]["seeds"][0] if name != "parameters"]
    lines = [f"| arm | learning rate | parameters | seeds | {' | '.join(columns)} |", "|---|--:|--:|--:|" + "--:|" * len(columns)]
    for row in rows:
        cells = [spread([seed[column] for seed in row["seeds"]]) for column in columns]
        size = f"{row['seeds'][0]['parameters']:,}"
        lines.append(f"| {row['arm']} | {row['lr']:g} | {size} | {len(row['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-2, 4e-3, 1e-3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number, (arm, student) in enumerate(ARMS.items()):
        tried: list[dict[str, Any]] = []
        for lr in args.lrs if arm in args.arms else []:
            tried.append({"arm": arm, "lr": lr, "steps": args.steps, "seeds": [one(number, student, lr, args.seeds[0], args.steps)]})
        rows += tried
        for seed in args.seeds[1:] if tried else []:
            best = min(tried, key=lambda row: float(row["seeds"][0]["loss"]))
            best["seeds"].append(one(number, student, best["lr"], seed, args.steps))
        for row in tried:
            print(f"{row['arm']}, learning rate {row['lr']:g}: {row['seeds']}", flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "results.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    print(table(rows))
