"""What quantisation-aware training wins back of what rounding a trained model loses: int4, int3, int2, ternary; plain and distilled.

    python scripts/experiments/make_stories.py          # once: the model, its tokenizer, texts
    python scripts/experiments/qat_recovery.py

The student is a published Llama of 260,032 parameters, its teacher its own float copy. Post-training quantisation (PTQ) rounds the student
as it is; plain QAT trains it on the labels alone, distilled QAT on the teacher's distribution too, for as many steps on the same texts in
the same order. One scale a row; of ternary weights one a matrix, or in groups one for 32 weights. Of the loss that PTQ adds, the share that
is won back is `(PTQ − QAT) / (PTQ − float)`. Two controls are trained as long without quantisation. Trains what is not in `runs/` yet,
prints a Markdown table (mean ± sd over the seeds), and writes it as JSON.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from grid import train

CONFIG = "scripts/experiments/stories.yaml"
RUNS = Path("runs/experiments/qat")
STUDENT = {"class_path": "Pretrained", "init_args": {"model": "runs/experiments/stories/teacher"}}
# the coarser, the further the weights must move
RATES = {"float": 1e-3, "int4": 1e-3, "int3": 2e-3, "int2": 5e-3, "ternary": 5e-3, "ternary-groups": 5e-3}
GROUPS = [  # 32 does not divide the 172 inputs of the down projection
    {"scheme": "ternary", "group_size": 32, "exclude": ["*down_proj"]},
    {"scheme": "ternary", "group_size": 43, "include": ["*down_proj"]},
]
HOW = {"distilled": [], "plain": ["--alone=true"]}


def quantised(scheme: str) -> list[str]:
    """The options of a run that trains through a scheme; `float` for none."""
    if scheme == "float":
        return []
    rows: dict[str, Any] = {"scheme": scheme} if scheme == "ternary" else {"scheme": scheme, "group_size": "row"}
    callbacks = [
        {"class_path": "QuantizationAwareTraining", "init_args": each} for each in (GROUPS if scheme == "ternary-groups" else [rows])
    ]
    return ["--trainer.callbacks=" + json.dumps(callbacks)]


def measured(folder: Path) -> dict[str, float]:
    """Held-out losses in nats a token: of the float model, of the student as it was rounded, and as it was trained."""
    models = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]
    after = models.get("student distilled") or models["student after"]
    found = {"before": models["student before"]["loss"], "after": after["loss"]}
    return found | ({"float": models["teacher"]["loss"]} if "teacher" in models else {})


def one(scheme: str, seed: int, steps: int, lr: float, runs: Path) -> dict[str, float]:
    """Train both ways from one seed; give the losses and the shares won back."""
    found: dict[str, dict[str, float]] = {}
    for how, options in HOW.items():
        folder = runs / f"{scheme}-{how}-{seed}"
        given = [f"--seed_everything={seed}", "--model.student=" + json.dumps(STUDENT), f"--model.optimizer.init_args.lr={lr}"]
        given += [
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={steps}",
            "--data.init_args.batch_size=8",
            "--trainer.enable_progress_bar=false",
        ]
        train(folder, CONFIG, [*given, *options, *quantised(scheme)])
        found[how] = measured(folder)
    base, ptq = found["distilled"]["float"], found["distilled"]["before"]
    row = {"float": base, "PTQ": ptq} | {how: each["after"] for how, each in found.items()}
    lost = ptq - base
    return row if scheme == "float" else row | {f"won back, {how}": (ptq - each["after"]) / lost for how, each in found.items()}


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    values = [scale * value for value in values]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """A scheme a row; losses in nats, shares in percent."""
    lines = ["| weights | seeds | float | PTQ | plain QAT | distilled QAT | won back, plain | won back, distilled |", "|---|" + "--:|" * 7]
    for scheme, seeds in rows.items():
        cells = [spread([seed[name] for seed in seeds], 3) for name in ("float", "PTQ", "plain", "distilled")]
        shares = [f"won back, {how}" for how in ("plain", "distilled")]
        cells += [f"{spread([seed[name] for seed in seeds], 0, 100)} %" if name in seeds[0] else "" for name in shares]
        lines.append(f"| {scheme} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", choices=RATES, default=list(RATES), metavar="SCHEME", help=f"of {', '.join(RATES)}")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=None, help=f"the same for all (default: {RATES})")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for scheme in args.schemes:
        rows[scheme] = []
        for seed in args.seeds:
            rows[scheme].append(one(scheme, seed, args.steps, args.lr or RATES[scheme], args.runs))
            print(f"{scheme}, seed {seed}: {rows[scheme][-1]}", flush=True)
    (args.runs / "qat_recovery.json").write_text(
        json.dumps({"steps": args.steps, "lr": args.lr or RATES, "rows": rows}, indent=2) + "\n", encoding="utf-8"
    )
    print(table(rows))
