"""The plots of a training run, out of the curves in `report.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill.report.history.series import Series, from_lists
from distill.report.page import plots
from distill.report.page.blocks import Picture

FEW = 24  # points, which are marked


def pictures(figures: Mapping[str, Any]) -> list[Picture]:
    """Validation, terms, their part in the objective, and the machine; what was not logged is left out.

    Args:
        figures: of the chapter on training: `curves` by key, `terms`, `teacher_loss`.
    """
    curves = {key: from_lists(lists) for key, lists in figures["curves"].items() if lists[0]}
    made = [
        _validation(curves),
        _terms(curves, figures["terms"]),
        _shares(curves, figures["terms"]),
        _machine(curves),
        _schedules(curves, figures["terms"]),
    ]
    return [picture for picture in made if picture is not None]


def line_plot(
    lines: Mapping[str, Series], unit: str, scale: float = 1.0, looks: Mapping[str, plots.Style] | None = None, from_zero: bool = False
) -> Figure:
    """Draw curves over the optimizer steps, each named at its end; on a logarithmic axis where they are far apart."""
    figure, (axes,) = plots.new(4.4, 3.0)
    looks = looks or plots.styles(lines)
    for name, curve in lines.items():
        few = len(curve.steps) <= FEW
        look = looks[name]
        axes.plot(curve.steps + 1, scale * curve.values, color=look.color, linestyle=look.linestyle, marker=look.marker * few, markersize=5)
    values = np.concatenate([scale * curve.values for curve in lines.values()])
    if (values > 0).all() and values.max() > 30 * values.min():
        axes.set_yscale("log")
    elif from_zero:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer step", ylabel=unit)
    if len(lines) > 1:
        _names(axes, {name: scale * float(curve.values[-1]) for name, curve in lines.items()}, looks)
    return figure


def _names(axes: Axes, ends: Mapping[str, float], looks: Mapping[str, plots.Style]) -> None:
    """Write each curve's name to the right of its end, apart from one another, in order of height."""
    axes.autoscale_view()
    heights = {name: float(axes.transAxes.inverted().transform(axes.transData.transform((1, end)))[1]) for name, end in ends.items()}
    last = -1.0
    for name in sorted(heights, key=lambda each: heights[each]):
        last = max(heights[name], last + 0.08)
        axes.text(1.02, last, name, transform=axes.transAxes, color=looks[name].color, va="center", fontsize=9)


def _picked(curves: Mapping[str, Series], keys: Mapping[str, str]) -> dict[str, Series]:
    """The curves that there are, by the names they are shown under."""
    return {name: curves[key] for key, name in keys.items() if key in curves}


def _validation(curves: Mapping[str, Series]) -> Picture | None:
    """Loss, accuracy and distance to the teacher on the validation rows."""
    made = []
    for keys, unit, scale in (
        ({"val/loss": "student", "val/teacher_loss": "teacher"}, "validation loss, nats", 1.0),
        ({"val/accuracy": "student", "val/teacher_accuracy": "teacher", "val/agreement": "agreement"}, "share, %", 100.0),
        ({"val/kl": "KL"}, "KL(teacher ‖ student), nats", 1.0),
    ):
        if lines := _picked(curves, keys):
            looks = plots.styles(["teacher", "agreement", "KL", "student"])
            made.append(line_plot(lines, unit, scale, looks))
    if not made:
        return None
    caption = "Validation. The teacher does not change; agreement is how often both have the same likeliest class."
    return Picture(made, "Validation loss, accuracy and KL over the steps, the student's beside the teacher's level.", caption)


def _terms(curves: Mapping[str, Series], terms: Sequence[str]) -> Picture | None:
    raw = _picked(curves, {f"train/{term}": term for term in terms})
    weighted = _picked(curves, {f"train/{term}_weighted": term for term in terms})
    if not raw:
        return None
    looks = plots.styles(terms)
    made = [line_plot(raw, "term, its own unit", looks=looks)]
    made += [line_plot(weighted, "weight × term", looks=looks)] if weighted else []
    return Picture(
        made,
        "Every term of the objective over the steps, raw and times its weight.",
        "The terms: as they are, and as they enter the objective.",
    )


def _shares(curves: Mapping[str, Series], terms: Sequence[str]) -> Picture | None:
    """What part of the objective each term is, its weight, and its gradient's norm."""
    if len(terms) < 2:
        return None
    looks, made = plots.styles(terms), []
    weighted = _picked(curves, {f"train/{term}_weighted": term for term in terms})
    if len(weighted) == len(terms):
        made.append(_stacked(weighted, looks))
    for suffix, unit in (
        ("weight", "weight"),
        ("grad_norm", "gradient norm at the branch point"),
        ("grad_norm_exact", "gradient norm on the parameters"),
    ):
        if lines := _picked(curves, {f"train/{term}_{suffix}": term for term in terms}):
            made.append(line_plot(lines, unit, looks=looks))
    if not made:
        return None
    caption = "Each term's part of the objective, its weight, and the norm of its gradient before the weight."
    return Picture(made, "Shares of the objective, weights and gradient norms of the terms over the steps.", caption)


def _stacked(weighted: Mapping[str, Series], looks: Mapping[str, plots.Style]) -> Figure:
    """Shares of the objective's absolute value, one on top of the other."""
    figure, (axes,) = plots.new(4.4, 3.0)
    steps = next(iter(weighted.values())).steps
    parts = np.abs([np.interp(steps, curve.steps, curve.values) for curve in weighted.values()])
    shares = 100 * parts / np.maximum(parts.sum(axis=0), 1e-30)
    axes.stackplot(steps + 1, shares, colors=[looks[name].color for name in weighted], alpha=0.75)
    axes.set(xlabel="optimizer step", ylabel="share of the objective, %", ylim=(0, 100))
    middles = shares[:, -1].cumsum() - shares[:, -1] / 2
    _names(axes, dict(zip(weighted, middles.tolist(), strict=True)), looks)
    return figure


def _machine(curves: Mapping[str, Series]) -> Picture | None:
    keys = {"train/lr": "learning rate", "train/grad_norm": "gradient norm before clipping", "tokens_per_s": "tokens a second"}
    made = [line_plot({name: curves[key]}, name, from_zero=True) for key, name in keys.items() if key in curves]
    return Picture(made, f"{', '.join(keys.values())} over the steps.".capitalize(), "The optimizer and the machine.") if made else None


def _schedules(curves: Mapping[str, Series], terms: Sequence[str]) -> Picture | None:
    """Temperatures that change, and how much is pruned."""
    temperatures = _picked(curves, {f"train/{term}_temperature": term for term in terms})
    moving = {name: curve for name, curve in temperatures.items() if np.ptp(curve.values) > 0}
    sparsity = {key.removeprefix("train/"): curve for key, curve in curves.items() if key.startswith("train/sparsity")}
    made = [line_plot(moving, "temperature")] if moving else []
    made += [line_plot(sparsity, "masked, %", 100.0)] if sparsity else []
    return Picture(made, "Temperatures and sparsity over the steps.", "What was scheduled.") if made else None
