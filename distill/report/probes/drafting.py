"""The student as the teacher's draft in speculative decoding, for the chapter on fidelity."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.metrics import speculative
from distill.report.costs import served
from distill.report.costs.cost import Candidate, clock
from distill.report.evidence import BEFORE, TEACHER, Evidence, Subject
from distill.report.intervals import interval
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.page.words import number, percent
from distill.types import Batch

MOST = 16  # tokens drafted at a time
ROUNDS = 15  # in which one token is timed


def figures(evidence: Evidence, names: Sequence[str]) -> dict[str, Any]:
    """The acceptance rate of every model, and the speed-up for each number of drafted tokens.

    Returns:
        By model `acceptance`; `cost` c with its `source`; `speed_up` with intervals for γ = 0 to `MOST`, if every position accepts alike;
        `along_text`, the same by the products of the positions that follow each other; and of it the `best_gamma`.
    """
    costs = costs_of(evidence, names)
    return {name: _of_model(evidence, name, costs[name]) for name in names}


def _of_model(evidence: Evidence, name: str, cost: Mapping[str, Any]) -> dict[str, Any]:
    observed = evidence.observed
    against = observed.models[name].against
    assert against is not None, "there is a teacher"
    betas = np.clip(against.acceptance, 0.0, 1.0)
    alpha = interval(lambda: observed.resampler.mean(betas))
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


def costs_of(evidence: Evidence, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The time of one run of each model over that of its teacher: timed in turn on one token, as decoding takes one at a time; by the
    parameters of both where one is no module of torch in this process.

    Parameters alone flatter a small student: every layer takes its time, however narrow it is.
    """
    seconds = _seconds(evidence, [name for name in (TEACHER, *names) if name in evidence.subjects])
    return {name: _cost(evidence, name, seconds) for name in names}


def _cost(evidence: Evidence, name: str, seconds: Mapping[str, float]) -> dict[str, Any]:
    if TEACHER in seconds and name in seconds:
        return {"value": seconds[name] / seconds[TEACHER], "source": "the time of one token"}
    ours, theirs = (_parameters(evidence, each) for each in (name, TEACHER))
    if not ours or not theirs:
        return {"missing": "neither the time nor the parameters of both are known: one of them is no model in this process"}
    return {"value": ours / theirs, "source": "parameters"}


def _seconds(evidence: Evidence, names: Sequence[str]) -> dict[str, float]:
    """The median time of one token of each model that is a module in this process."""
    candidates = {name: Candidate(partial(_run, evidence.subjects[name])) for name in names if evidence.subjects[name].model is not None}
    if len(candidates) < 2:
        return {}
    one = {name: value[:1, :1].to(evidence.device) for name, value in served.inputs_of(evidence.batches[0]).items()}
    clocked = clock(candidates, one, one, ROUNDS)
    return {name: median(wall for wall, _ in each.single) for name, each in clocked.items()}


@torch.no_grad()
def _run(subject: Subject, batch: Batch) -> Tensor:
    return [served.logits(outputs) for outputs in served.all_outputs(subject.target(batch))][-1]


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
