"""The demo's claim over three seeds: the student distilled, the same student alone for the same steps, and alone for the same time.

    python scripts/experiments/demo_seeds.py

Trains what is not in `runs/` yet, writes `docs/demo.md` and `docs/demo.svg`, and prints the table.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from matplotlib import pyplot as plt

from distill.cli import main
from distill.lookup import find_config

SEEDS = (0, 1, 2)
CONFIG = "kd_llama.yaml"
RUNS = Path("runs")
TEACHER, ALONE, DISTILLED, LONGER = "#555555", "#d55e00", "#0072b2", "#e69f00"  # Okabe & Ito: told apart by the colour-blind


def train(name: str, *args: str) -> dict[str, Any]:
    """Train a run unless it is there, and give its report."""
    report = RUNS / name / "report.json"
    if not report.is_file() and main(["fit", "--config", CONFIG, "--name", name, "--report_rows=0", *args]) != 0:
        raise SystemExit(f"the run {name} failed")
    return json.loads(report.read_text(encoding="utf-8"))["models"]


def one_seed(seed: int, steps: int) -> dict[str, float]:
    """Distil and train alone; then alone again for as long as distilling took."""
    models = train(f"demo-{seed}", f"--seed_everything={seed}")
    distilled, alone = models["student distilled"], models["student alone"]
    longer = round(steps * distilled["seconds"] / alone["seconds"])
    again = train(f"demo-{seed}-longer", f"--seed_everything={seed}", "--alone=true", "--baseline=false", f"--trainer.max_steps={longer}")
    return {
        "teacher": models["teacher"]["loss"],
        "alone": alone["loss"],
        "distilled": distilled["loss"],
        "longer": again["student after"]["loss"],
        "steps": longer,
        "alone_s": alone["seconds"],
        "distilled_s": distilled["seconds"],
        "longer_s": again["student after"]["seconds"],
    }


def table(rows: list[dict[str, float]], steps: int) -> str:
    """The Markdown table of losses in nats, and the margins with their spread (sample standard deviation over the seeds)."""
    lines = [
        f"| seed | teacher | alone, {steps} steps | distilled, {steps} steps | margin | alone, same time | margin |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for seed, r in zip(SEEDS, rows, strict=True):
        lines.append(
            f"| {seed} | {r['teacher']:.3f} | {r['alone']:.3f} ({r['alone_s']:.0f} s) | {r['distilled']:.3f} ({r['distilled_s']:.0f} s) | "
            f"{r['alone'] - r['distilled']:+.3f} | {r['longer']:.3f} ({r['steps']:.0f} steps, {r['longer_s']:.0f} s) | "
            f"{r['longer'] - r['distilled']:+.3f} |"
        )
    means = {k: spread([r[k] for r in rows]) for k in ("teacher", "alone", "distilled", "longer")}
    same_steps, same_time = (spread([r[k] - r["distilled"] for r in rows], sign=True) for k in ("alone", "longer"))
    lines.append(
        f"| mean ± sd | {means['teacher']} | {means['alone']} | {means['distilled']} | {same_steps} | {means['longer']} | {same_time} |"
    )
    return "\n".join(lines)


def spread(values: list[float], sign: bool = False) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.mean(values):{'+' if sign else ''}.3f} ± {statistics.stdev(values):.3f}"


def curve(name: str) -> tuple[list[int], list[float]]:
    """Held-out loss over optimizer steps of a run, from its metrics."""
    lines = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [(line["step"] + 1, line["val/loss"]) for line in lines if "val/loss" in line]
    return [step for step, _ in seen], [loss for _, loss in seen]


def figure(rows: list[dict[str, float]], path: Path) -> None:
    """Held-out loss over steps, every seed a line."""
    plt.switch_backend("svg")
    plt.rcParams.update({"svg.hashsalt": "distill", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axes.axhline(rows[0]["teacher"], color=TEACHER, linestyle="--", label="teacher")
    for seed in SEEDS:
        for suffix, colour, label in (("-alone", ALONE, "student alone"), ("", DISTILLED, "student distilled")):
            steps, losses = curve(f"demo-{seed}{suffix}")
            axes.plot(steps, losses, color=colour, marker="o", markersize=3, linewidth=1.4, label=label if seed == SEEDS[0] else None)
    axes.set(xlabel="optimizer steps", ylabel="held-out loss, nats per token", title=f"{CONFIG}, {len(SEEDS)} seeds")
    axes.legend(frameon=False)
    fig.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    steps = yaml.safe_load(Path(find_config(CONFIG)).read_text(encoding="utf-8"))["trainer"]["max_steps"]
    rows = [one_seed(seed, steps) for seed in SEEDS]
    text = table(rows, steps)
    print(text)
    introduction = (
        "# The demo over three seeds\n\nHeld-out loss in nats per token; seconds of training, validation included. "
        "Printed by `make seeds`.\n\n![Held-out loss of teacher, student alone and student distilled](demo.svg)\n\n"
    )
    Path("docs/demo.md").write_text(introduction + text + "\n", encoding="utf-8")
    figure(rows, Path("docs/demo.svg"))
