"""Feature matching with and without GradNorm, against logits only: a 5-layer Llama teaches a 3-layer one.

    python scripts/experiments/make_stories.py          # once: teacher, tokenizer, texts
    python scripts/experiments/feature_matching.py

Every arm has the same cross-entropy and KL terms, the same texts in the same order and, for each seed, the same initialisation. Trains what
is not in `runs/` yet, and prints the held-out figures of every arm, mean ± sd over the seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from grid import train

CONFIG = "scripts/experiments/stories.yaml"
RUNS = Path("runs/experiments/feature_matching")


def fixed(**weights: float) -> str:
    return "--model.balancer=" + json.dumps({"class_path": "FixedWeights", "init_args": {"weights": weights}})


def grad_norm(**shares: float) -> str:
    return "--model.balancer=" + json.dumps({"class_path": "GradNorm", "init_args": {"shares": shares}})


HIDDEN = "--model.losses.hidden=HiddenMSE"
ARMS = {
    "logits only": [],
    "logits only, GradNorm": [grad_norm(ce=0.2, kd=0.8)],
    "+ hidden states, weight 0.1": [HIDDEN, fixed(ce=0.2, kd=0.8, hidden=0.1)],
    "+ hidden states, weight 1": [HIDDEN, fixed(ce=0.2, kd=0.8, hidden=1.0)],
    "+ hidden states, weight 10": [HIDDEN, fixed(ce=0.2, kd=0.8, hidden=10.0)],
    "+ hidden states, GradNorm": [HIDDEN, grad_norm(ce=0.15, kd=0.65, hidden=0.2)],
}


def figures(folder: Path) -> dict[str, float]:
    """The student's held-out figures."""
    model = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]["student distilled"]
    return {name: model[name] for name in ("loss", "kl", "agreement")}


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}")
    args = parser.parse_args()
    lines = ["| arm | seeds | loss, nats | KL to the teacher | same top-1 |", "|---|--:|--:|--:|--:|"]
    for number, (arm, overrides) in enumerate(ARMS.items()):
        if arm not in args.arms:
            continue
        rows = []
        for seed in args.seeds:
            folder = RUNS / f"arm{number}-{seed}"
            train(folder, CONFIG, [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false", *overrides])
            rows.append(figures(folder))
            print(f"{arm}, seed {seed}: {rows[-1]}", flush=True)
        cells = [spread([row[name] for row in rows], 3) for name in ("loss", "kl", "agreement")]
        lines.append(f"| {arm} | {len(rows)} | {' | '.join(cells)} |")
    print("\n".join(lines))
