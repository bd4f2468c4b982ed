"""The student as the teacher's draft in speculative decoding, for the chapter on fidelity."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.metrics import speculative
from distill.report.evidence import BEFORE, TEACHER, Evidence
from distill.report.intervals import interval
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.page.words import number, percent

MOST = 16  # tokens drafted at a time


def figures(evidence: Evidence, names: Sequence[str]) -> dict[str, Any]:
    """The acceptance rate of every model, and the speed-up for each number of drafted tokens.

    Returns:
        By model `acceptance`; `cost` c with its `source`; `speed_up` with intervals for γ = 0 to `MOST`, if every position accepts alike;
        `along_text`, the same by the products of the positions that follow each other; and of it the `best_gamma`.
    """
    return {name: _of_model(evidence, name) for name in names}


def _of_model(evidence: Evidence, name: str) -> dict[str, Any]:
    observed = evidence.observed
    against = observed.models[name].against
    assert against is not None, "there is a teacher"
    betas = np.clip(against.acceptance, 0.0, 1.0)
    alpha, cost = interval(lambda: observed.resampler.mean(betas)), cost_of(evidence, name)
    found: dict[str, Any] = {"acceptance": alpha, "cost": cost}
    if "missing" in alpha or "missing" in cost:
        return found
    gammas = np.arange(MOST + 1)
    ends = {key: speculative.speed_up(value, gammas, cost["value"]) for key, value in alpha.items()}
    tokens = speculative.tokens_along_text(betas, observed.rows, MOST)
    along = speculative.per_call(tokens, gammas, cost["value"])
    best = speculative.best_gamma(alpha["value"], cost["value"], MOST)
    return found | {
        "speed_up": [{key: float(values[gamma]) for key, values in ends.items()} for gamma in gammas],
        "along_text": [float(value) if np.isfinite(value) else None for value in along],
        "tokens_per_call": float(speculative.tokens_per_call(alpha["value"], best)),
        "best_gamma": best,
    }


def cost_of(evidence: Evidence, name: str) -> dict[str, Any]:
    """The time of one run of a model over that of its teacher: as `distill cost` has measured it, or else by the parameters of both."""
    measured = _measured(evidence.folder / "cost.json")
    called = "student" if name == evidence.student else name
    if TEACHER in measured and called in measured:
        return {"value": measured[called] / measured[TEACHER], "source": "measured latencies"}
    ours, theirs = (_parameters(evidence, each) for each in (name, TEACHER))
    if not ours or not theirs:
        return {"missing": "neither the latencies nor the parameters of both are known; `distill cost` measures them"}
    return {"value": ours / theirs, "source": "parameters"}


def _measured(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    return {name: model["latency_ms"] for name, model in json.loads(path.read_text(encoding="utf-8"))["models"].items()}


def _parameters(evidence: Evidence, name: str) -> int | None:
    model = evidence.subjects[name].model if name in evidence.subjects else None
    if model is not None:
        return sum(p.numel() for p in model.parameters())
    known = evidence.run.get("models", {}).get(name, {}).get("parameters")
    return None if known is None else int(known)


def blocks(figures: Mapping[str, Any], student: str, looks: Mapping[str, plots.Style]) -> list[Block]:
    """A sentence, the speed-up against γ, and the figures."""
    ours = figures[student]
    if "speed_up" not in ours:
        return [Missing("the speed-up of speculative decoding", ours["cost"].get("missing") or ours["acceptance"]["missing"])]
    gamma = ours["best_gamma"]
    best = ours["speed_up"][gamma]
    text = f"As the teacher's draft, {percent(ours['acceptance'])} of the student's tokens are accepted: "
    if gamma == 0:
        text += "too few for what the student costs, so that drafting does not pay."
    else:
        text += f"decoding would be {number(best, 2)} times as fast with {gamma} tokens drafted at a time."
    return [Note(text, "plain" if gamma else "warning"), _picture(figures, looks), _grid(figures, ours["cost"]["source"])]


def _picture(figures: Mapping[str, Any], looks: Mapping[str, plots.Style]) -> Picture:
    figure, (axes,) = plots.new()
    drawn = {name: model for name, model in figures.items() if "speed_up" in model and name != BEFORE}
    for name, model in drawn.items():
        values, low, high = ([each[key] for each in model["speed_up"]] for key in ("value", "low", "high"))
        plots.curve(axes, range(len(values)), values, looks[name], name, low, high)
    axes.axhline(1, color=plots.MUTED, linewidth=1)
    axes.set(xlabel="tokens drafted at a time, γ", ylabel="times as fast as the teacher alone")
    axes.set_ylim(bottom=0)
    plots.legend(axes)
    said = "; ".join(
        f"{name} {number(model['speed_up'][model['best_gamma']]['value'], 2)} times at γ = {model['best_gamma']}"
        for name, model in drawn.items()
    )
    caption = (
        "Lines take every position to accept with the same probability, which the formula asks for; bands are 95 % intervals. "
        "Above the grey line drafting pays."
    )
    return Picture(figure, f"Expected speed-up of speculative decoding: {said}.", caption)


def _grid(figures: Mapping[str, Any], source: str) -> Grid:
    rows = []
    for name, model in figures.items():
        cells = [name, percent(model["acceptance"]), number(model["cost"].get("value"), 3)]
        if "speed_up" in model:
            best = model["best_gamma"]
            cells += [
                str(best),
                number(model["tokens_per_call"], 2),
                number(model["speed_up"][best], 2),
                number(model["along_text"][best], 2),
            ]
        rows.append(cells + [""] * (7 - len(cells)))
    head = ["", "accepted", "cost c", "best γ", "tokens a call", "times as fast", "along the text"]
    caption = (
        f"c is the time of one run of the model over the teacher's, here by {source}. A call of the teacher checks all drafted tokens at "
        "once. “Times as fast” takes all positions to accept alike, “along the text” by the products of those that follow each other, for "
        "hard ones come together. The text is held out, not generated. In batches there is less to gain."
    )
    return Grid(head, rows, caption)
