"""Fidelity: whether the student says what the teacher says, also where neither is right, and what it is worth as the teacher's draft."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from distill.metrics.fidelity import of_mistakes
from distill.report.evidence import TEACHER, Evidence, Observed
from distill.report.intervals import interval, only
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note
from distill.report.page.words import number, percent
from distill.report.probes import drafting, where_kl
from distill.report.sections.base import Section
from distill.tasks import CausalLM


class Fidelity(Section):
    """Divergences, agreement, dark knowledge, the teacher's mistakes, and speculative decoding."""

    name: ClassVar[str] = "fidelity"
    title: ClassVar[str] = "Fidelity"
    question: ClassVar[str] = "Does the student say what the teacher says, also where neither is right?"
    order: ClassVar[int] = 20

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Compare every model with the teacher."""
        observed = evidence.observed
        wrong = observed.teacher.top != observed.labels
        names = [name for name in observed.models if name != TEACHER]
        found: dict[str, Any] = {
            "student": evidence.student,
            "names": list(observed.models),
            "unit": evidence.task.unit,
            "top_k": observed.top_k,
            "sample": len(observed.sample),
            "positions": len(observed.labels),
            "mistakes": int(wrong.sum()),
            "models": {name: _of_model(observed, name) for name in names},
            "where": where_kl.figures(observed, names),
        }
        if isinstance(evidence.task, CausalLM):
            found["drafting"] = drafting.figures(evidence, names)
        return found

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """A sentence, where the divergence sits, the tables, and the student as a draft."""
        looks = plots.styles(figures["names"])
        blocks: list[Block] = [_said(figures), *where_kl.pictures(figures["where"], figures["student"], figures["unit"], looks)]
        blocks += [_grid(figures), *_mistakes(figures)]
        return blocks + (drafting.blocks(figures["drafting"], figures["student"], looks) if "drafting" in figures else [])


def _of_model(observed: Observed, name: str) -> dict[str, Any]:
    columns, teacher, labels = observed.models[name], observed.teacher, observed.labels
    assert columns.against is not None, "there is a teacher"
    against, mean, share = columns.against, observed.resampler.mean, observed.resampler.share
    mistakes, wrong = of_mistakes(columns.top, teacher.top, labels), teacher.top != labels
    found = {
        "kl": interval(partial(mean, against.kl)),
        "reverse_kl": interval(partial(mean, against.reverse_kl)),
        "agreement": interval(partial(share, (columns.top == teacher.top).astype(np.float64))),
        "overlap": interval(partial(share, against.overlap)),
        "rank": _rank(observed, name),
        "entropy_gap": interval(partial(observed.resampler.difference, columns.entropy, teacher.entropy)),
        "entropy": interval(partial(mean, columns.entropy)),
    }
    none = {"missing": "the teacher makes no mistake on these rows"}
    for key, column in mistakes._asdict().items():
        found[f"mistakes_{key}"] = interval(partial(share, only(column, wrong))) if wrong.any() else none
    return found


def _rank(observed: Observed, name: str) -> dict[str, Any]:
    if observed.num_classes < 3:
        return {"missing": "of two classes one is wrong, and has no order"}
    columns = observed.models[name]
    assert columns.against is not None, "there is a teacher"
    return interval(lambda: observed.resampler.mean(columns.against.rank))  # type: ignore[union-attr]  # just looked at


def _said(figures: Mapping[str, Any]) -> Block:
    ours = figures["models"][figures["student"]]
    if "missing" in ours["kl"]:
        return Missing("how sure the figures are", ours["kl"]["missing"])
    text = (
        f"The student's first choice is the teacher's for {percent(ours['agreement'])} of held-out {figures['unit']}s, and its "
        f"distribution is {number(ours['kl'], unit='nats')} away (forward KL)."
    )
    same = ours["mistakes_same"]
    if "value" in same:
        text += f" Where the teacher is wrong, the student makes the same mistake in {percent(same, 0)} of cases"
        text += f" and is right in {percent(ours['mistakes_right'], 0)}."
    return Note(text)


def _grid(figures: Mapping[str, Any]) -> Grid:
    k = figures["top_k"]
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "forward KL": ("kl", number),
        "reverse KL": ("reverse_kl", number),
        "agreement": ("agreement", percent),
        f"top-{k} overlap": ("overlap", percent),
        "rank correlation": ("rank", partial(number, digits=2)),
        "entropy gap": ("entropy_gap", _signed),
    }
    if k == 1:
        del columns["top-1 overlap"]  # it is the agreement
    rows = [[name, *(text(model[key]) for key, text in columns.values())] for name, model in figures["models"].items()]
    part = f", on {figures['sample']:,} of {figures['positions']:,} positions" if figures["sample"] < figures["positions"] else ""
    caption = (
        "Beside the teacher, at temperature 1. KL and entropy in nats; forward KL weighs what the teacher thinks possible, reverse KL what "
        f"the student does. Rank correlation is Spearman's, of the wrong classes' probabilities{part}: the dark knowledge kept. "
        "Entropy gap is the model's minus the teacher's: below 0 it is the surer of the two."
    )
    return Grid(["", *columns], rows, caption)


def _signed(figure: Any) -> str:
    return number(figure).replace("-", "−") if "value" in figure and figure["value"] < 0 else number(figure)


def _mistakes(figures: Mapping[str, Any]) -> list[Block]:
    ranks = {model["rank"]["missing"] for model in figures["models"].values() if "missing" in model["rank"]}
    blocks: list[Block] = [Missing("the rank correlation of wrong classes", why) for why in sorted(ranks)]
    if not figures["mistakes"]:
        return [*blocks, Missing("agreement on the teacher's mistakes", "the teacher makes none on these rows")]
    head = ["", "the same mistake", "right instead", "another mistake"]
    rows = [[name, *(percent(model[f"mistakes_{key}"]) for key in OF)] for name, model in figures["models"].items()]
    caption = f"What each model answers at the {figures['mistakes']:,} {figures['unit']}s where the teacher is wrong."
    return [*blocks, Grid(head, rows, caption)]


OF = ("same", "right", "other")
