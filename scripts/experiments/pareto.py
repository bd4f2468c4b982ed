"""Quality against bytes and against latency: a teacher, students of it, and what each compression makes of them.

    python scripts/experiments/pareto.py                    # trains the teacher of configs/teacher_llama.yaml first, once
    python scripts/experiments/pareto.py --seeds 0 --steps 4 --out /tmp/look     # a look at whether it runs

Every arm has the same terms, texts and steps. Each student is exported for storage (packed without loss) and for a CPU's runtime, and
`distill cost` measures it beside its teacher, one row at a time. Trains, exports and measures what is not in `runs/` yet, prints a table of
means ± sd over the seeds, and draws it. Times are for a quiet machine: where it was not, remove the runs' `cost.json` and come again.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from grid import train
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from distill.cli import main

CONFIG = "kd_llama_qat.yaml"
TEACHER = "runs/teacher_llama/student"
RUNS = Path("runs/experiments/pareto")
Points = dict[str, list[dict[str, float]]]


def student(name: str, **options: Any) -> str:
    return "--model.student=" + json.dumps({"class_path": name, "init_args": options})


def callback(name: str, **options: Any) -> str:
    return "--trainer.callbacks=" + json.dumps([{"class_path": name, "init_args": options}])


FLOAT = "--trainer.callbacks=null"
ORIGINAL = {"class_path": "Pretrained", "init_args": {"model": TEACHER}}
FLOATS = ["packed:bf16", "openvino:int8"]
# what is trained, and the exports that it is shipped as
ARMS: dict[str, tuple[list[str], list[str]]] = {
    "student": ([FLOAT], FLOATS),
    "QAT int4": ([], ["packed:int4", "onnx:int4"]),
    "QAT ternary": ([callback("QuantizationAwareTraining", scheme="ternary", start=0.25, warmup=0.25)], ["packed:int8", "openvino:int8"]),
    "80 % of the weights pruned": ([callback("Pruning", sparsity=0.8)], ["packed:bf16"]),
    "half of the neurons pruned": ([callback("Pruning", sparsity=0.5, structure="neurons")], FLOATS),
    "cut to 40 % of the teacher": ([FLOAT, student("Shrunk", model=TEACHER, target=0.4)], FLOATS),
    "low rank, 40 % of the teacher": ([FLOAT, student("LowRank", base=ORIGINAL, target=0.4, activation_aware=True)], FLOATS),
}


def measured(arm: str, seed: int, steps: int, runs: Path) -> dict[str, dict[str, float]]:
    """Train, export and measure an arm: the figures of teacher, student and export."""
    options, shipped = ARMS[arm]
    folder = runs / f"{''.join(c if c.isalnum() else '-' for c in arm)}-{seed}"
    own = [f"--seed_everything={seed}", f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={min(steps, 100)}"]
    train(folder, CONFIG, [*own, "--trainer.enable_progress_bar=false", *options])
    of_run, cost = ["--config", str(folder / "config.yaml")], folder / "cost.json"
    for form in shipped:
        if not (folder / "export" / form.replace(":", "-")).is_dir():
            cost.unlink(missing_ok=True)
            if main(["export", *of_run, "--format", form]):
                raise SystemExit(f"{folder} cannot be exported as {form}")
    if not cost.is_file() and main(["cost", *of_run]):
        raise SystemExit(f"{folder} cannot be measured")
    models: dict[str, dict[str, float]] = json.loads(cost.read_text(encoding="utf-8"))["models"]
    return models


def collect(seeds: Sequence[int], steps: int, runs: Path) -> Points:
    """The figures of every point, one of each seed."""
    points: Points = {"teacher, float32": []}
    for arm, (_, shipped) in ARMS.items():
        for seed in seeds:
            models = measured(arm, seed, steps, runs)
            if arm == "student":
                points["teacher, float32"].append(models["teacher"])
                points.setdefault("student, float32", []).append(models["student"])
            for form in shipped:
                points.setdefault(f"{arm}, {form.replace(':', ' ')}", []).append(models[form.replace(":", "-")])
    return points


def of(point: Sequence[Mapping[str, float]], name: str) -> list[float]:
    scale = {"disk_bytes": 1e-3}.get(name, 1.0)
    return [scale * seed[name] for seed in point]


def spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(points: Points) -> str:
    """A Markdown table, a point a row."""
    lines = ["| | seeds | loss, nats | kB on disk | ms, one row | rows a second, 8 |", "|---|" + "--:|" * 5]
    for name, point in points.items():
        columns = (("loss", 3), ("disk_bytes", 0), ("latency_ms", 2), ("throughput", 0))
        lines.append(f"| {name} | {len(point)} | {' | '.join(spread(of(point, column), digits) for column, digits in columns)} |")
    return "\n".join(lines)


def front(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both figures, smaller being better."""
    best: list[tuple[float, float]] = []
    for cost, loss in sorted(found):
        if not best or loss < best[-1][1]:
            best.append((cost, loss))
    return best


def figure(points: Points, path: Path) -> None:
    """Two panels, means with their spread and the front: a colour an arm, a shape a form."""
    plt.switch_backend("svg")
    plt.rcParams.update({"svg.hashsalt": "distill", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, panels = plt.subplots(1, 2, figsize=(10.5, 5.2), sharey=True, layout="constrained")
    arms, forms = (list(dict.fromkeys(part)) for part in zip(*(_parts(name) for name in points), strict=True))
    colours: Any = dict(zip(arms, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    shapes = dict(zip(forms, "soD^v", strict=False))
    for axes, column, label in zip(panels, ("disk_bytes", "latency_ms"), ("kB on disk", "ms for one row"), strict=True):
        for name, point in points.items():
            arm, form = _parts(name)
            x, y = of(point, column), of(point, "loss")
            bars = {"xerr": stdev(x), "yerr": stdev(y)} if len(point) > 1 else {}
            axes.errorbar(mean(x), mean(y), **bars, marker=shapes[form], color=colours[arm], markersize=8, linestyle="", elinewidth=1)
        best = front([(mean(of(point, column)), mean(of(point, "loss"))) for point in points.values()])
        axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0, drawstyle="steps-post")
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set(ylabel="held-out loss, nats per token")
    keys = [Line2D([], [], marker="s", linestyle="", color=colour, label=arm) for arm, colour in colours.items()]
    keys += [Line2D([], [], marker=shape, linestyle="", color="none", markeredgecolor="0.3", label=form) for form, shape in shapes.items()]
    fig.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, metadata={"Date": None})


def _parts(name: str) -> tuple[str, str]:
    """What was trained, and what it is shipped as: "student, packed bf16", "QAT int4, onnx int4"."""
    arm, _, form = name.rpartition(", ")
    return arm, form.rsplit(" ")[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of pareto.svg")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    points = collect(args.seeds, args.steps, args.runs)
    figure(points, args.out / "pareto.svg")
    print(table(points))
