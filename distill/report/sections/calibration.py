"""Whether a model's probabilities can be believed: calibration of every model, and how sure we are of it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes

from distill.metrics.calibration import BINS, equal_width
from distill.report.evidence import TEACHER, Evidence
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.page.summary import SURE
from distill.report.page.words import number, percent
from distill.report.probes import calibration
from distill.report.sections.base import Section

FEW = 10  # positions: a bin with fewer is not drawn
SMALL = 0.01  # a point of probability: what is less is called little
MOST = 0.5  # of an error, at most, is left where most of it is mended


class Calibration(Section):
    """Confidence against accuracy of every model, the temperature that would mend it, and how wide the intervals are."""

    name: ClassVar[str] = "calibration"
    title: ClassVar[str] = "Calibration: does it know what it does not know?"
    question: ClassVar[str] = "Is the student right as often as its probabilities say?"
    order: ClassVar[int] = 30

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Measure every model that was observed; positions with the same row are drawn together."""
        observed = evidence.observed
        models = {name: calibration.of_model(observed, columns) for name, columns in observed.models.items()}
        return {
            "student": evidence.student,
            "names": list(evidence.subjects),
            "unit": evidence.task.unit,
            "positions": len(observed.labels),
            "rows": len(np.unique(observed.rows)),
            "sampled": len(observed.sample),
            "bins": BINS,
            "models": models,
            "beside_teacher": calibration.beside_teacher(observed, models, evidence.student),
        }

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """A sentence, the reliability diagrams, the figures, and what one temperature would mend."""
        models = figures["models"]
        blocks: list[Block] = [_verdict(figures), _diagrams(figures), _errors(models, figures)]
        if not _has(models, "classwise_ece"):
            blocks.append(Missing("class-wise ECE", models[figures["student"]]["classwise_ece"]["missing"]))
        blocks += [*_one_number(models[figures["student"]]["temperature"]), _mended(models, figures)]
        return blocks + _widths(figures["beside_teacher"], figures["rows"])


def _points(figure: Mapping[str, float], digits: int = 1) -> str:
    return number({key: 100 * value for key, value in figure.items()}, digits, "points")


def _negative(figure: Mapping[str, float]) -> dict[str, float]:
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}


def _verdict(figures: Mapping[str, Any]) -> Note:
    """Whether the student is more certain than it has a right to be, and than its teacher."""
    student = figures["models"][figures["student"]]
    over, error = student["overconfidence"], student["ece"]
    if "missing" in over:
        return Note(f"How certain the student may be was not measured: {over['missing']}.", "warning")
    said = (
        f"On average it gives its answer a probability of {percent(student['confidence']['value'])}, "
        f"and is right in {percent(student['accuracy']['value'])} of cases: "
    )
    little = "a little " * (abs(over["value"]) < SMALL)
    if over["low"] > 0:
        beside, is_more = _beside(figures["beside_teacher"])
        tone: Any = "warning" if is_more and not little else "plain"
        return Note(
            f"The student is {little}more certain than it has a right to be. {said}{_points(over)} too certain. {beside}".strip(), tone
        )
    if over["high"] < 0:
        theirs = figures["models"].get(TEACHER, {}).get("overconfidence", {})
        too = f" Its teacher is so by {_points(_negative(theirs))}." if theirs.get("high", 0) < 0 else ""
        return Note(f"The student is {little}less certain than it could be. {said}{_points(_negative(over))} too cautious.{too}")
    chance = f"the difference of {_points(over)} may be chance"
    if error["low"] > SMALL:
        levels = f"But it is too certain at some levels and too cautious at others: its ECE is {percent(error)}."
        return Note(f"The student is as certain as it has a right to be on average alone. {said}{chance}. {levels}")
    if max(-over["low"], over["high"]) > SURE:
        rows = "These rows do not show that the student is more or less certain than it has a right to be"
        return Note(f"{rows}, and are too few to rule it out. {said}{chance}.")
    return Note(f"The student is as certain as it has a right to be. {said}{chance}.", "good")


def _beside(beside: Mapping[str, Any]) -> tuple[str, bool]:
    """How the student's overconfidence compares with the teacher's, in words, and whether it is more as far as we know."""
    more = beside.get("overconfidence", beside)
    if "missing" in more:
        return "", True
    if more["low"] > 0:
        return f"That is {_points(more)} more than its teacher.", True
    return "Its teacher is no less so.", False


def _diagrams(figures: Mapping[str, Any]) -> Picture:
    """Reliability of teacher and student, each with the histogram of its confidence."""
    looks, names = plots.styles(figures["names"]), [name for name in (TEACHER, figures["student"]) if name in figures["models"]]
    figure, axes = plots.new(width=4.6 * len(names), height=4.2, columns=len(names))
    for place, name in zip(axes, names, strict=True):
        _diagram(place, name, figures["models"][name]["reliability"], looks[name], figures["positions"])
    return Picture(
        figure,
        f"Reliability diagrams of {' and '.join(names)}: the share of answers that is right against the probability given to them.",
        "A model whose probabilities are right is on the grey line; below it, it is too certain. Bars: the share of positions with that "
        f"confidence. Points: {figures['bins']} bins of equal width, those of at least {FEW} positions, with 95 % intervals over rows.",
    )


def _diagram(axes: Axes, name: str, bins: list[dict[str, Any]], look: plots.Style, positions: int) -> None:
    axes.set_title(name, loc="left", fontsize=10)
    axes.plot([0, 1], [0, 1], color=plots.MUTED, linewidth=1)
    confidence = np.array([each["confidence"] for each in bins])
    axes.bar(
        (equal_width(confidence) + 0.5) / BINS,
        np.array([each["count"] for each in bins]) / positions,
        width=0.9 / BINS,
        color=plots.FAINT,
    )
    drawn = [each for each in bins if each["count"] >= FEW and isinstance(each["accuracy"], dict)]
    for each in drawn:
        axes.plot([each["confidence"]] * 2, [each["accuracy"]["low"], each["accuracy"]["high"]], color=look.color, linewidth=2)
    axes.plot(
        [each["confidence"] for each in drawn],
        [each["accuracy"]["value"] for each in drawn],
        color=look.color,
        linestyle=look.linestyle,
        marker=look.marker,
        markersize=5,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="confidence: probability of its answer", ylabel="share that is right")
    axes.text(0.97, 0.33, "too certain", ha="right", fontsize=9, color=plots.MUTED)
    axes.text(0.03, 0.94, "too cautious", fontsize=9, color=plots.MUTED)


def _has(models: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    return any("missing" not in model[key] for model in models.values())


def _errors(models: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any]) -> Grid:
    columns = {"confidence": "mean confidence", "accuracy": "accuracy", "overconfidence": "confidence − accuracy, points"}
    columns |= {"ece": "ECE", "adaptive_ece": "adaptive ECE", "classwise_ece": "class-wise ECE"}
    columns = {key: head for key, head in columns.items() if _has(models, key)}
    caption = (
        f"Expected calibration error (ECE): mean distance of confidence and accuracy over {figures['bins']} bins of equal width or "
        f"(adaptive) of equal number; class-wise: of the probability of each class. Over {figures['positions']:,} {figures['unit']}s of "
        f"{figures['rows']:,} rows. Chance makes an ECE too large; its interval allows for that, so its value may lie at the upper end."
    )
    return Grid(["", *columns.values()], [[name, *(_cell(model, key) for key in columns)] for name, model in models.items()], caption)


def _cell(model: Mapping[str, Any], key: str) -> str:
    figure = model[key]
    if "missing" in figure:
        return ""
    return _points(figure).replace(" points", "") if key == "overconfidence" else percent(figure, 2 if key == "classwise_ece" else 1)


def _one_number(fit: Mapping[str, Any]) -> list[Block]:
    """A sentence where dividing the logits by one number would mend much of the student's error."""
    if (
        "missing" in fit
        or fit["fitted"]["low"] <= 1 <= fit["fitted"]["high"]
        or fit["ece_after"]["value"] > MOST * fit["ece_before"]["value"]
    ):
        return []
    return [
        Note(
            f"One number mends most of it: with its logits divided by {_fitted(fit)}, the student's ECE falls from "
            f"{percent(fit['ece_before'])} to {percent(fit['ece_after'])}, on rows that the number was not fitted on."
        )
    ]


def _mended(models: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any]) -> Grid:
    head = ["", "NLL, nats", "Brier score", "fitted temperature", "NLL before", "NLL after", "ECE before", "ECE after"]
    rows = []
    for name, model in models.items():
        fit = model["temperature"]
        found = [number(fit.get(key)) for key in ("nll_before", "nll_after")] + [
            percent(fit.get(key)) for key in ("ece_before", "ece_after")
        ]
        rows.append([name, number(model["nll"]), number(model["brier"]), _fitted(fit), *found])
    caption = (
        f"Negative log-likelihood of the label (NLL) and Brier score (0 to 2): less is better. The temperature by which the logits are "
        f"divided to make the labels most likely, above 1 where a model is too certain; before and after are of {figures['sampled']:,} "
        f"sampled {figures['unit']}s, each half of the rows at the temperature that was fitted on the other half."
    )
    return Grid(head, rows, caption)


def _fitted(fit: Mapping[str, Any]) -> str:
    if "missing" in fit:
        return ""
    value = fit["fitted"]["value"]
    return f"{'≥' if value > 1 else '≤'} {value:g}" if fit["edge"] else number(fit["fitted"], 2)


def _widths(beside: Mapping[str, Any], rows: int) -> list[Block]:
    """How sure we are of the student's figures, beside the teacher's."""
    if "missing" in beside:
        return [Missing("the student beside its teacher", beside["missing"])]
    known = {key: ratio for key, ratio in beside["widths"].items() if isinstance(ratio, float)}
    blocks: list[Block] = [
        Missing(f"width of the interval of {key}", ratio["missing"]) for key, ratio in beside["widths"].items() if key not in known
    ]
    if known:
        names = {"accuracy": "accuracy", "nll": "NLL"}
        said = " and ".join(f"{number(ratio, 2)} times as wide for {names[key]}" for key, ratio in known.items())
        blocks.insert(0, Note(f"How sure we are: over {rows:,} rows, the student's 95 % intervals are {said} as the teacher's."))
    return blocks
