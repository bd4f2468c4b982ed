"""What the curves of a run say in words: whether it converged, and whether every term of the objective pulled."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.report.history.series import Series, at
from distill.report.page.words import percent

STILL = 0.01  # of the whole fall of the loss: where more of it came in the last tenth of the steps, training was not done
SILENT, DOMINANT = 0.01, 0.9  # shares of the pull
LEAST = 20  # points of a training loss of which means are taken


def ending(found: Mapping[str, Series]) -> dict[str, Any]:
    """Say whether the loss was still falling at the end, and by how much in the last tenth of the steps.

    Of the validation where it was measured at three steps or more: L(0.9 S) − L(S), straight between two measurements. Else of the
    training loss: its mean over the last tenth but one less that over the last.

    Returns:
        `says`, one sentence; where there is enough to tell also `state` (`settled`, `falling` or `rising`), `of` which figure, how much it
        `fell` in the last tenth and on the `whole`, in nats.
    """
    val, train = (found[key].finite if key in found else None for key in ("val/loss", "train/loss"))
    if val is not None and len(val.steps) >= 3:
        return _of_validation(val)
    if train is None or len(train.steps) < LEAST:
        return {"says": "Too little was logged to say whether training converged."}
    tenth = len(train.values) // 10
    last = float(train.values[-tenth:].mean())
    fell, whole = float(train.values[-2 * tenth : -tenth].mean()) - last, float(train.values[:tenth].mean()) - last
    return _told("train/loss", "The training loss (validation was measured less than three times)", fell, whole)


def _of_validation(val: Series) -> dict[str, Any]:
    best, end = int(val.values.argmin()), float(val.values[-1])
    fell = at(val, val.steps[-1] - 0.1 * (val.steps[-1] + 1)) - end
    least = float(val.values[best])
    if end - least > STILL * (val.values.max() - least):
        says = f"Validation loss was rising at the end: it was {least:.4f} nats after step {val.steps[best] + 1:,.0f}, and is {end:.4f}."
        return {"says": says, "state": "rising", "of": "val/loss", "fell": fell, "whole": float(val.values[0]) - end}
    return _told("val/loss", "Validation loss", fell, float(val.values[0]) - end)


def _told(key: str, what: str, fell: float, whole: float) -> dict[str, Any]:
    falling = fell > STILL * abs(whole)
    if falling:
        share = f", {percent(fell / whole, 0)} of its whole fall since it was first measured" if whole > 0 else ""
        says = (
            f"{what} was still falling at the end, by {fell:.4f} nats in the last tenth of the steps{share}: longer training may give more."
        )
    else:
        says = f"{what} had settled: in the last tenth of the steps it {'fell' if fell >= 0 else 'rose'} by {abs(fell):.4f} nats."
    return {"says": says, "state": "falling" if falling else "settled", "of": key, "fell": fell, "whole": whole}


def pull(found: Mapping[str, Series], terms: Sequence[str]) -> dict[str, Any]:
    """Give each term's share of the pull on the student, `w_i g_i / Σ_j w_j g_j`, the mean over the second half of the steps.

    g is the norm of the term's gradient on the parameters where all terms have it, else at its branch point.

    Returns:
        `shares` by term, and `at` which the norms are; or `missing`.
    """
    if len(terms) < 2:
        return {"missing": "there is one term, so that nothing is shared"}
    for suffix, where in (("grad_norm_exact", "parameters"), ("grad_norm", "branch points")):
        norms = {term: found.get(f"train/{term}_{suffix}") for term in terms}
        weights = {term: found.get(f"train/{term}_weight") for term in terms}
        if all(curve is not None and len(curve.finite.steps) for curve in (*norms.values(), *weights.values())):
            strengths = {term: _strength(norms[term], weights[term]) for term in terms}
            total = sum(strengths.values())
            if total > 0:
                return {"at": where, "shares": {term: strength / total for term, strength in strengths.items()}}
    return {"missing": "gradient norms of all terms were not logged"}


def _strength(norm: Series | None, weight: Series | None) -> float:
    assert norm is not None, "looked at before"
    assert weight is not None, "looked at before"
    norm, weight = norm.finite, weight.finite
    late = norm.steps >= norm.steps[-1] / 2
    return float(np.mean(norm.values[late] * np.abs(np.interp(norm.steps[late], weight.steps, weight.values))))


def voices(pulled: Mapping[str, Any]) -> list[str]:
    """A sentence for every term that did next to nothing, or left next to nothing to the others."""
    shares: Mapping[str, float] = pulled.get("shares", {})
    silent = [
        f"The term `{term}` was all but silent: {percent(share)} of the pull (weight × gradient norm)."
        for term, share in shares.items()
        if share < SILENT
    ]
    return silent + [f"The term `{term}` dominated: {percent(share, 0)} of the pull." for term, share in shares.items() if share > DOMINANT]
