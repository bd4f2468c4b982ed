"""Quality class by class and by groups of classes, for the chapter on quality."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.data.base import DistillData
from distill.data.profile import FEW, HEAD
from distill.metrics import classes
from distill.metrics.bootstrap import Resampler
from distill.report.evidence import Bools, Floats, Ints, Observed
from distill.report.intervals import interval, only

CELLS = 2**24
"""Rows × classes, and resamples × classes, up to which classes have intervals."""

TOO_FEW = 20
"""Rows below which a share has no interval: where all of them agree, as few often do, resamples would say that it is certain."""


def groups(observed: Observed, counts: Ints) -> dict[str, Any]:
    """Accuracy and loss of every model on labels that are frequent in training, and on rare ones.

    Returns:
        By group, those that are empty left out: `limits` in words, `classes`, `trained` labels, `positions` that were looked at, and
        `models` with `accuracy` and `loss` of each.
    """
    group = classes.group_of(counts, HEAD, FEW)
    limits = (f"more than {HEAD}", f"{FEW} to {HEAD}", f"1 to {FEW - 1}", "0")
    found: dict[str, Any] = {}
    for number, name in enumerate(classes.GROUPS):
        here = group[observed.labels] == number
        if (group == number).any():
            found[name] = {
                "limits": limits[number],
                "classes": int((group == number).sum()),
                "trained": int(counts[group == number].sum()),
                "positions": int(here.sum()),
                "models": {model: _of_group(observed, model, here) for model in observed.models},
            }
    return found


def _of_group(observed: Observed, name: str, here: Bools) -> dict[str, Any]:
    if not here.any():
        none = {"missing": "no held-out label is of this group"}
        return {"accuracy": none, "loss": none}
    columns, resampler = observed.models[name], observed.resampler
    right = columns.correct(observed.labels)
    if len(np.unique(observed.rows[here])) < TOO_FEW:
        return {"accuracy": float(right[here].mean()), "loss": float(columns.nll[here].mean())}
    return {
        "accuracy": interval(lambda: resampler.share(only(right, here))),
        "loss": interval(lambda: resampler.mean(only(columns.nll, here))),
    }


def table(observed: Observed, data: DistillData, names: list[str]) -> dict[str, Any]:
    """Precision, recall and F1 of every class.

    Args:
        observed: of a classifier.
        data: names and counts the classes.
        names: the models whose classes are listed.

    Returns:
        `macro_f1` and `balanced_accuracy` of every model; `classes`, a list with `name`, `trained`, `held_out` and `models`. Without an
        interval what is of fewer than `TOO_FEW` rows.
    """
    resampler, counts = observed.resampler, data.class_counts().tolist()
    small = max(resampler.num_rows, resampler.resamples) * observed.num_classes <= CELLS
    found = {name: _of_model(observed, name, resampler if small else None) for name in observed.models}
    held_out = np.bincount(observed.labels, minlength=observed.num_classes).tolist()
    return {
        "macro_f1": {name: each["macro_f1"] for name, each in found.items()},
        "balanced_accuracy": {name: each["balanced_accuracy"] for name, each in found.items()},
        "classes": [
            {
                "name": data.class_name(i),
                "trained": counts[i],
                "held_out": held_out[i],
                "models": {name: found[name]["classes"][i] for name in names},
            }
            for i in range(observed.num_classes)
        ],
    }


def _of_model(observed: Observed, name: str, resampler: Resampler | None) -> dict[str, Any]:
    top, num_classes = observed.models[name].top, observed.num_classes
    values = classes.per_class(top, observed.labels, num_classes)
    draws = None if resampler is None else classes.resampled(resampler.grouped, top, observed.labels, num_classes)
    rows = {"precision": np.bincount(top, minlength=num_classes), "recall": values.support, "f1": values.support}

    def figure(value: float, drawn: Floats | None, enough: bool = True) -> Any:
        if np.isnan(value):
            return {"missing": "no held-out row is of this class"}
        if resampler is None or drawn is None or not enough:
            return float(value)
        return interval(lambda: resampler.interval(float(value), drawn))

    def of_class(key: str, i: int) -> Any:
        return figure(getattr(values, key)[i], None if draws is None else getattr(draws, key)[:, i], rows[key][i] >= TOO_FEW)

    return {
        "macro_f1": figure(float(values.macro_f1), None if draws is None else draws.macro_f1),
        "balanced_accuracy": figure(float(values.balanced_accuracy), None if draws is None else draws.balanced_accuracy),
        "classes": [{key: of_class(key, i) for key in rows} for i in range(num_classes)],
    }


def worst_first(table: Mapping[str, Any], student: str) -> list[dict[str, Any]]:
    """The classes that were held out, the student's lowest F1 first."""
    there = [each for each in table["classes"] if each["held_out"]]
    return sorted(there, key=lambda each: value(each["models"][student]["f1"]))


def value(figure: Any) -> float:
    """A figure without its interval; infinite where it is missing, so that it comes last."""
    if isinstance(figure, Mapping):
        return float(figure.get("value", np.inf))
    return float(figure)
