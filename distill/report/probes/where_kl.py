"""Where the divergence from the teacher sits: in a few positions or in all, and where the teacher is sure or undecided."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.report.evidence import BEFORE, Floats, Observed
from distill.report.page import plots
from distill.report.page.blocks import Block, Picture
from distill.report.page.words import percent

SHARES = 50  # points of the curve
TENTHS = 10


def figures(observed: Observed, names: Sequence[str]) -> dict[str, Any]:
    """How the forward KL of each model is spread over positions.

    Returns:
        `positions`, shares of them, those of the largest KL first, and by model `kl`, the share of its sum that they have; `half`, the
        share of positions that has half of it; `entropy`, the teacher's mean entropy in each tenth of the positions, the surest first, and
        by model `by_entropy`, the mean KL there.
    """
    shares = np.linspace(0, 1, SHARES + 1)
    tenths = np.array_split(np.argsort(observed.teacher.entropy, kind="stable"), TENTHS)
    tenths = [each for each in tenths if len(each)]
    found: dict[str, Any] = {
        "positions": shares.tolist(),
        "entropy": [float(observed.teacher.entropy[each].mean()) for each in tenths],
        "kl": {},
        "half": {},
        "by_entropy": {},
    }
    for name in names:
        against = observed.models[name].against
        assert against is not None, "there is a teacher"
        found["by_entropy"][name] = [float(against.kl[each].mean()) for each in tenths]
        curve = concentration(against.kl)
        if curve is not None:
            found["kl"][name] = np.interp(shares, np.linspace(0, 1, len(curve)), curve).tolist()
            found["half"][name] = float(np.searchsorted(curve, 0.5) / (len(curve) - 1))
    return found


def concentration(kl: Floats) -> Floats | None:
    """The share of the sum that the n largest have, for n = 0 to N: `[N + 1]`; None where the sum is 0."""
    largest = np.sort(np.maximum(kl, 0))[::-1]
    sums = np.concatenate([[0.0], largest.cumsum()])
    return sums / sums[-1] if sums[-1] > 0 else None


def pictures(figures: Mapping[str, Any], student: str, unit: str, looks: Mapping[str, plots.Style]) -> list[Block]:
    """Both curves, side by side; not of the student before training, beside which all others are flat."""
    if student not in figures["kl"]:
        return []
    names = [name for name in figures["kl"] if name != BEFORE]
    concentrated, (axes,) = plots.new()
    for name in names:
        plots.curve(axes, figures["positions"], figures["kl"][name], looks[name], name)
    axes.plot([0, 1], [0, 1], color=plots.MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel=f"share of {unit}s, the farthest first", ylabel="share of the forward KL", xlim=(0, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    by_entropy, (other,) = plots.new()
    for name in names:
        plots.curve(other, figures["entropy"], figures["by_entropy"][name], looks[name], name)
    other.set(xlabel="the teacher's entropy, nats", ylabel="forward KL, nats")
    other.set_ylim(bottom=0)
    for each in (axes, other):
        plots.legend(each)
    sure, lost = figures["by_entropy"][student][0], figures["by_entropy"][student][-1]
    alt = f"Half of the student's divergence sits in {percent(figures['half'][student], 0)} of {unit}s."
    caption = (
        f"{alt} On the dotted line all would differ alike. Right: means over tenths of the {unit}s by the teacher's entropy; the student "
        f"is {sure:.3f} nats away where the teacher is surest, and {lost:.3f} where it is least decided."
    )
    return [Picture([concentrated, by_entropy], alt, caption)]
