"""How well a model is calibrated, in figures, from what was observed of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import softmax

from distill.metrics import calibration as measures
from distill.metrics import temperature
from distill.metrics.bootstrap import Interval
from distill.report.evidence import TEACHER, Bools, Columns, Observed
from distill.report.intervals import interval
from distill.types import DataError


def of_model(observed: Observed, columns: Columns) -> dict[str, Any]:
    """All figures of one model.

    Args:
        observed: the pass that it was part of.
        columns: what it said.

    Returns:
        Intervals, `temperature` before and after, and `reliability` by bin; `{"missing": why}` in place of what could not be measured.
    """
    draw, confidence, correct = observed.resampler, columns.confidence, columns.correct(observed.labels)
    right = correct.astype(np.float64)
    wide, even = measures.equal_width(confidence), measures.equal_mass(confidence)
    return {
        "accuracy": interval(lambda: draw.share(right)),
        "confidence": interval(lambda: draw.mean(confidence)),
        "overconfidence": interval(lambda: draw.difference(confidence, right)),
        "ece": interval(lambda: measures.ece(draw, confidence, correct, wide)),
        "adaptive_ece": interval(lambda: measures.ece(draw, confidence, correct, even)),
        "classwise_ece": interval(lambda: _classwise(observed, columns)),
        "nll": interval(lambda: draw.mean(columns.nll)),
        "brier": interval(lambda: draw.mean(columns.brier)),
        "temperature": _temperature(observed, columns, correct[observed.sample]),
        "reliability": _reliability(observed, columns, correct),
    }


def _classwise(observed: Observed, columns: Columns) -> Interval:
    if columns.logits is None:
        needed = measures.PER_CLASS * observed.num_classes
        raise DataError(
            f"it needs each class often, {needed:,} positions for {observed.num_classes:,} classes; {len(observed.sample):,} were sampled"
        )
    probs = softmax(columns.logits.astype(np.float64), axis=1)
    return measures.classwise_ece(observed.resampler.at(observed.sample), probs, observed.labels[observed.sample])


def _temperature(observed: Observed, columns: Columns, correct: Bools) -> dict[str, Any]:
    """What temperature scaling does to the sampled positions."""
    draw = observed.resampler.at(observed.sample)
    nll, confidence = columns.scaled[:, :, temperature.ONE].astype(np.float64).T
    try:
        fit = temperature.fitted(draw, columns.scaled)
        return {
            "fitted": fit.temperature.as_dict(),
            "edge": fit.edge,
            "nll_before": draw.mean(nll).as_dict(),
            "nll_after": draw.mean(fit.nll).as_dict(),
            "ece_before": measures.ece(draw, confidence, correct, measures.equal_width(confidence)).as_dict(),
            "ece_after": measures.ece(draw, fit.confidence, correct, measures.equal_width(fit.confidence)).as_dict(),
        }
    except DataError as error:
        return {"missing": str(error)}


def _reliability(observed: Observed, columns: Columns, correct: Bools) -> list[dict[str, Any]]:
    bins = measures.reliability(observed.resampler, columns.confidence, correct, measures.equal_width(columns.confidence))
    return [
        {"count": each.count, "confidence": each.confidence, "accuracy": each.interval.as_dict() if each.interval else each.accuracy}
        for each in bins
    ]


def beside_teacher(observed: Observed, models: Mapping[str, Mapping[str, Any]], student: str) -> dict[str, Any]:
    """How much more certain the student is than its teacher, and how many times as wide its intervals are.

    Args:
        observed: the pass.
        models: `of_model` of each, by name.
        student: the name of the final student.
    """
    if TEACHER not in models:
        return {"missing": "there is no teacher that gives probabilities of all classes for held-out rows"}
    ours, theirs = observed.models[student], observed.models[TEACHER]
    gaps = [columns.confidence - columns.correct(observed.labels) for columns in (ours, theirs)]
    return {
        "overconfidence": interval(lambda: observed.resampler.difference(*gaps)),
        "widths": {key: _width_ratio(models[student][key], models[TEACHER][key]) for key in ("accuracy", "nll")},
    }


def _width_ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Any:
    """How many times as wide the student's interval is as the teacher's."""
    for figure in (ours, theirs):
        if "missing" in figure:
            return figure
    if theirs["high"] == theirs["low"]:
        return {"missing": "the teacher's interval has no width"}
    return (ours["high"] - ours["low"]) / (theirs["high"] - theirs["low"])
