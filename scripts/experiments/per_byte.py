"""Quality per byte of a store: dense targets, random draws, the likeliest classes with and without the tail.

    python scripts/experiments/per_byte.py                    # trains the teacher of configs/teacher_llama.yaml first, once
    python scripts/experiments/per_byte.py --seeds 0 --steps 4 --out /tmp/look     # a look at whether it runs

The student learns from the targets alone, forward KL at T = 1, in the same steps on the same rows; held-out loss is on the true tokens.
Writes the stores and trains what is not in `runs/` yet, prints a table (mean ± sd over the seeds) and draws it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from grid import train

from distill.cli import main
from distill.teachers.store import finished_shards

CONFIG = "scripts/experiments/per_byte.yaml"
RUNS = Path("runs/experiments/per_byte")
SOURCE = {"class_path": "OnlineTeacher", "init_args": {"model": "runs/teacher_llama/student", "recipe": "teacher_llama.yaml"}}
RENORMALISED = "scripts.experiments.renormalised.Renormalised"
KINDS = {"draws": "o-", "top-k and tail": "s-", "top-k, renormalised": "^--"}


def arms() -> dict[str, tuple[str, dict[str, int]]]:
    """The kind of each arm, and what its store keeps; nothing for the teacher in memory."""
    found: dict[str, tuple[str, dict[str, int]]] = {"dense": ("dense", {})}
    found |= {f"{n} draws": ("draws", {"k": 0, "draws": n}) for n in (8, 16, 64)}
    for k in (8, 50, 128):
        found[f"top {k} and tail"] = ("top-k and tail", {"k": k, "draws": 0})
        found[f"top {k}, renormalised"] = ("top-k, renormalised", {"k": k, "draws": 0})
    return found


def teacher(kind: str, kept: Mapping[str, int], runs: Path) -> dict[str, Any]:
    """The teacher's block of the YAML; writes the store where it is not there."""
    if not kept:
        return SOURCE
    given = {"store": str(runs / f"store-{kept['k']}-{kept['draws']}"), **kept, "source": SOURCE}
    cached = {"class_path": "CachedTeacher", "init_args": given}
    if main(["cache", "--config", CONFIG, f"--model.teacher={json.dumps(cached)}"]):
        raise SystemExit(f"the store of {kept} cannot be written")
    return cached if kind != "top-k, renormalised" else {"class_path": RENORMALISED, "init_args": given}


def bytes_per_position(kept: Mapping[str, int], runs: Path) -> float:
    """Of a store on disk."""
    shards = finished_shards(runs / f"store-{kept['k']}-{kept['draws']}").values()
    return sum(shard.bytes for shard in shards) / sum(shard.positions for shard in shards)


def loss(folder: Path) -> float:
    """The student's held-out loss."""
    models = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]
    return float((models.get("student distilled") or models["student after"])["loss"])


def arm(name: str, seeds: Sequence[int], steps: int, runs: Path) -> dict[str, Any]:
    """Train one arm with every seed."""
    kind, kept = arms()[name]
    block = json.dumps(teacher(kind, kept, runs))
    losses = []
    for seed in seeds:
        folder = runs / f"{''.join(c if c.isalnum() else '-' for c in name)}-{steps}-{seed}"
        own = [f"--seed_everything={seed}", f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        train(folder, CONFIG, [*own, f"--model.teacher={block}"])
        losses.append(loss(folder))
    return {"kind": kind, "losses": losses, "bytes": bytes_per_position(kept, runs) if kept else None}


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """An arm a row."""
    lines = ["| targets | bytes per position | held-out loss, nats | above dense |", "|---|--:|--:|--:|"]
    for name, row in rows.items():
        above = [loss - dense for loss, dense in zip(row["losses"], rows["dense"]["losses"], strict=True)]
        size = "(in memory)" if row["bytes"] is None else f"{row['bytes']:.1f}"
        lines.append(f"| {name} | {size} | {spread(row['losses'])} | {spread(above) if name != 'dense' else ''} |")
    return "\n".join(lines)


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss against bytes; the teacher in memory is a line."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.axhline(mean(rows["dense"]["losses"]), color="0.4", linewidth=1, label="dense, the teacher in memory")
    for kind, style in KINDS.items():
        of_kind = sorted((row["bytes"], row["losses"]) for row in rows.values() if row["kind"] == kind and row["bytes"])
        if of_kind:
            errors = [stdev(losses) if len(losses) > 1 else 0.0 for _, losses in of_kind]
            axes.errorbar([size for size, _ in of_kind], [mean(losses) for _, losses in of_kind], errors, fmt=style, capsize=3, label=kind)
    axes.set(xscale="log", xlabel="bytes per position", ylabel="held-out loss, nats", title="What a student learns from each kind of store")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--arms", nargs="+", choices=arms(), default=list(arms()), metavar="ARM", help="`dense` must be among them")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of stores and runs")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of per_byte.svg")
    args = parser.parse_args()
    if "dense" not in args.arms:
        parser.error("--arms: dense must be among them, for the others are compared with it")
    found = {}
    for name in args.arms:
        found[name] = arm(name, args.seeds, args.steps, args.runs)
        print(f"{name}: {found[name]}", flush=True)
    (args.runs / "per_byte.json").write_text(json.dumps({"steps": args.steps, "rows": found}, indent=2) + "\n", encoding="utf-8")
    draw(found, args.out / "per_byte.svg")
    print(table(found))
