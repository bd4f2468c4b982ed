"""A report of every kind of block, with names that try to break out of the page and tables that try to break it."""

import math
from pathlib import Path

import numpy as np

from distill.report.page import plots
from distill.report.page.blocks import Block, Fold, Grid, Missing, Note, Picture, Tile, Tiles
from distill.report.page.render import Chapter, page
from distill.report.page.words import number, percent

NASTY = "<script>alert('x')</script>"
MODELS = ["teacher", "student before", "student alone", "student distilled", "export/int8.onnx", f"{NASTY}{'w' * 60}"]
CHAPTERS = ["summary", "quality", "calibration", "cost", "training", "provenance"]


def write(folder: Path) -> Path:
    """Write the page."""
    path = folder / "report.html"
    path.write_text(html(), encoding="utf-8")
    return path


def html() -> str:
    """The page."""
    made = {"summary": _summary(), "quality": _quality(), "calibration": _calibration(), "cost": _cost(), "training": _training()}
    made["provenance"] = [Fold(f"Configuration {NASTY}", f"name: {NASTY}\n" + "x" * 300), Fold("Environment", "torch 2.9\n" * 200)]
    chapters = [Chapter(name, f"{name.capitalize()}: {NASTY}", f"Is it {NASTY}?", made[name]) for name in CHAPTERS]
    return page(f"Report of {NASTY}{'r' * 60}", "A student and its teacher", chapters, {"teacher": "/very/long/" * 20, "steps": "400"})


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.95 * value, "high": 1.06 * value}


def _summary() -> list[Block]:
    tiles = [Tile("accuracy kept", "86.3 %", "85.1 – 87.4"), Tile("calibration", "incomprehensible", NASTY), Tile("size", "11 %")]
    return [Note("The student keeps 86 % of the teacher's accuracy (85 – 87) at 11 % of its size.", "good"), Tiles(tiles)]


def _quality() -> list[Block]:
    figure, (axes,) = plots.new(6.4, 3.0)
    looks = plots.styles(MODELS)
    plots.dots_with_intervals(axes, {name: _interval(0.1 + 0.02 * i) for i, name in enumerate(MODELS[:5])}, looks, percent)
    axes.set_xlabel("accuracy")
    head = ["", *(f"a figure with a long name, {i}" for i in range(10))]
    rows = [[name, *(number(_interval(1234.5 * i), 1) for i in range(10))] for name in MODELS]
    classes = [[repr(name), percent(0.5), "12,345"] for name in ("\n    ", "</table>", "&amp;", "import")]
    return [
        Note("The student is below its teacher."),
        Picture(figure, f"Accuracy of six models {NASTY}", f"Each dot is a model {NASTY}."),
        Grid(head, rows, f"Ten figures a model, in nats {NASTY}. " + "They were measured on rows that neither has seen. " * 3),
        Grid(["class", "recall", "tokens"], classes, "The commonest classes."),
    ]


def _calibration() -> list[Block]:
    figure, both = plots.new(9.6, 3.4, columns=2)
    x = np.linspace(0.05, 0.95, 10)
    for axes, name in zip(both, ("teacher", "student distilled"), strict=True):
        axes.plot([0, 1], [0, 1], color=plots.MUTED, linewidth=1, linestyle=":")
        axes.set_title(name, loc="left")
        plots.curve(axes, x, x**1.2, plots.styles(MODELS)[name], name, x**1.3, x**1.1)
        plots.legend(axes)
    return [
        Note("The student is more certain than it has a right to be.", "warning"),
        Picture(figure, "Two reliability diagrams", "Above the line a model is too modest."),
    ]


def _cost() -> list[Block]:
    figure, (axes,) = plots.new()
    points = {name: (10.0 ** (i % 3), 0.1 + 0.02 * i) for i, name in enumerate(MODELS[:5])}
    for name, (x, y) in points.items():
        axes.plot([x], [y], color=plots.styles(MODELS)[name].color, marker="o")
    axes.set_xscale("log")
    plots.label_points(axes, points)
    return [
        Picture(figure, "Accuracy against size", "Up and to the left is better."),
        Missing("Energy", f"neither RAPL nor NVML can be read {NASTY}; `modprobe intel_rapl` as root"),
    ]


def _training() -> list[Block]:
    figures = []
    for _ in range(4):
        figure, (axes,) = plots.new(3.8, 2.6)
        axes.plot(range(100), [math.exp(-step / 30) for step in range(100)])
        axes.set_ylabel("nats a token")
        for i, color in enumerate((*plots.PALETTE, plots.MUTED)):
            axes.text(50, 0.1 * i, f"in colour {i}", color=color, fontsize=9)
        figures.append(figure)
    return [Picture(figures, "Four curves", "All fall.")]
