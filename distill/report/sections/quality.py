"""Quality: how often each model is right, how sure that is, and how much of the gap to the teacher the student closed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distill.report.evidence import ALONE, BEFORE, TEACHER, Evidence, Floats, Observed
from distill.report.intervals import interval
from distill.report.page import plots
from distill.report.page.blocks import Block, Fold, Grid, Missing, Note, Picture
from distill.report.page.words import count, number, percent
from distill.report.probes import by_class
from distill.report.sections.base import Section
from distill.tasks import CausalLM

SHOWN = 20  # classes in the table
KEYS = ("accuracy", "loss")  # in which there is a gap to close
FEW = f"Without an interval: what is of fewer than {by_class.TOO_FEW} rows."


class Quality(Section):
    """Accuracy and loss of every model, retention, the share of the gap that was closed, and classes."""

    name: ClassVar[str] = "quality"
    title: ClassVar[str] = "Quality"
    question: ClassVar[str] = "How good is the student, beside its teacher and beside itself without one?"
    order: ClassVar[int] = 10

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Measure every model on the held-out rows."""
        observed, language = evidence.observed, isinstance(evidence.task, CausalLM)
        names, counts = list(observed.models), evidence.data.class_counts().numpy()
        found: dict[str, Any] = {
            "student": evidence.student,
            "names": names,
            "unit": evidence.task.unit,
            "rows": sum(len(batch["labels"]) for batch in evidence.batches),
            "of_rows": observed.of_rows,
            "positions": len(observed.labels),
            "models": {name: _of_model(observed, name, language) for name in names} | _absent(evidence.absent),
            "gap_closed": _gap_closed(observed, evidence.student),
            "over_alone": _over_alone(observed, evidence.student),
            "groups": by_class.groups(observed, counts),
        }
        if not language:
            shown = [name for name in (TEACHER, evidence.student) if name in observed.models]
            found["by_class"] = by_class.table(observed, evidence.data, shown)
        return found

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """A sentence, accuracy and loss with their intervals, the table, and the classes."""
        blocks: list[Block] = [_said(figures), _picture(figures), _grid(figures), *_looked_at(figures)]
        blocks += [Missing(name, model["missing"]) for name, model in figures["models"].items() if "missing" in model]
        gap = figures["gap_closed"]
        whys = {"": gap["missing"]} if "missing" in gap else {f" in {key}": gap[key]["missing"] for key in KEYS if "missing" in gap[key]}
        blocks += [Missing(f"the share of the gap that was closed{where}", why) for where, why in whys.items()]
        if len(figures["groups"]) > 1:
            blocks.append(_groups(figures))
        return blocks + (_classes(figures) if "by_class" in figures else [])


def _of_model(observed: Observed, name: str, language: bool) -> dict[str, Any]:
    columns, resampler = observed.models[name], observed.resampler
    right = columns.correct(observed.labels).astype(np.float64)
    found: dict[str, Any] = {"accuracy": interval(lambda: resampler.share(right)), "loss": interval(lambda: resampler.mean(columns.nll))}
    if language:
        found["perplexity"] = _exp(found["loss"])
    if name != TEACHER and TEACHER in observed.models:
        theirs = observed.teacher.correct(observed.labels).astype(np.float64)
        found["retention"] = interval(lambda: resampler.ratio(right, theirs))
    return found


def _absent(absent: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"missing": why} for name, why in absent.items()}


def _exp(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexity, `exp(loss)`: an order-keeping function, which takes an interval's ends along."""
    if "missing" in loss:
        return dict(loss)
    if max(loss.values()) > 700:
        return {"missing": f"exp({loss['value']:.0f}) is larger than a number of 64 bits"}
    return {key: math.exp(value) for key, value in loss.items()}


def _gap_closed(observed: Observed, student: str) -> dict[str, Any]:
    """Which share of the way from a student without a teacher to the teacher the student has gone.

    `(a_student − a_from) / (a_teacher − a_from)` in accuracy, and the same in loss, each with the paired interval of a ratio. `from` is the
    student trained alone, or the student before training where there is none.
    """
    if TEACHER not in observed.models:
        return {"missing": "there is no teacher that gives probabilities of all classes for held-out rows"}
    start = next((name for name in (ALONE, BEFORE) if name in observed.models and name != student), None)
    if start is None:
        return {"missing": "neither a student alone nor the student before training is there to start from"}
    right = {name: observed.models[name].correct(observed.labels).astype(np.float64) for name in (TEACHER, start, student)}
    nll = {name: -observed.models[name].nll for name in (TEACHER, start, student)}
    return {"from": start, "accuracy": _share(observed, right, start, student), "loss": _share(observed, nll, start, student)}


def _over_alone(observed: Observed, student: str) -> dict[str, Any]:
    """By how much the student is more often right than the one trained alone: what the teacher was good for, paired."""
    if ALONE not in observed.models or student == ALONE:
        return {"missing": "no student was trained without the teacher"}
    ours, alone = (observed.models[name].correct(observed.labels).astype(np.float64) for name in (student, ALONE))
    return interval(lambda: observed.resampler.difference(ours, alone))


def _share(observed: Observed, scores: Mapping[str, Floats], start: str, student: str) -> dict[str, Any]:
    gap, way = scores[TEACHER] - scores[start], scores[student] - scores[start]
    whole = interval(lambda: observed.resampler.mean(gap))
    if "missing" in whole:
        return whole
    if whole["low"] <= 0:
        return {"missing": f"the teacher is not clearly better than the {start}: there is no gap to close"}
    return interval(lambda: observed.resampler.ratio(way, gap)) | {"gained": interval(lambda: observed.resampler.mean(way))}


def _said(figures: Mapping[str, Any]) -> Block:
    student, teacher = figures["models"][figures["student"]], figures["models"].get(TEACHER, {})
    if "missing" in student["accuracy"]:
        return Missing("how sure the figures are", student["accuracy"]["missing"])
    unit = "tokens" if figures["unit"] == "token" else f"{figures['unit']}s"
    text = f"The student predicts {percent(student['accuracy'])} of held-out {unit}"
    if "accuracy" not in teacher:
        return Note(f"{text} correctly; there is no teacher to compare with.")
    text += f" correctly, its teacher {percent(teacher['accuracy'])}"
    text += f": it keeps {percent(student['retention'])} of the teacher's accuracy" if "value" in student["retention"] else ""
    gap, over = figures["gap_closed"].get("accuracy", {}), figures["over_alone"]
    if over.get("high", 0) < 0:
        worse = {key: -over[other] for key, other in (("value", "value"), ("low", "high"), ("high", "low"))}
        return Note(f"{text}. The same student trained alone is right in {percent(worse)} of {unit} more: the teacher did harm.", "warning")
    if "value" not in gap:
        return Note(f"{text}.")
    start = "a student trained without the teacher" if figures["gap_closed"]["from"] == ALONE else "the student before training"
    closed = f"{text}, and has closed {percent(gap, 0)} of the gap between {start} and the teacher."
    gained = gap["gained"].get("low", 0) > 0
    verdict = "" if gained else " It is not clearly better than where it started from."
    return Note(closed + verdict, "good" if gained else "warning")


def _present(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: model for name, model in figures["models"].items() if "missing" not in model}


def _picture(figures: Mapping[str, Any]) -> Picture:
    models, looks = _present(figures), plots.styles(figures["names"])
    drawn = {name: model for name, model in models.items() if name != BEFORE or ALONE not in models}
    made = []
    for key, label in (("accuracy", "accuracy"), ("loss", f"loss, nats a {figures['unit']}")):
        figure, (axes,) = plots.new(height=0.9 + 0.42 * len(drawn))
        text = (lambda x: percent(x)) if key == "accuracy" else (lambda x: number(x))
        plots.dots_with_intervals(axes, {name: model[key] for name, model in drawn.items()}, looks, text)
        axes.set_xlabel(label + (" (more is better)" if key == "accuracy" else " (less is better)"))
        axes.margins(x=0.12)
        if key == "accuracy":
            axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g} %")
        made.append(figure)
    said = "; ".join(f"{name} {percent(model['accuracy'])}" for name, model in drawn.items())
    left_out = " The student before training is far outside, and in the table." if len(drawn) < len(models) else ""
    return Picture(made, f"Accuracy and loss of every model: {said}.", f"Dots are the figures, lines their 95 % intervals.{left_out}")


def _grid(figures: Mapping[str, Any]) -> Grid:
    models, language = _present(figures), figures["unit"] == "token"
    columns = {"accuracy": percent, "kept": percent, "loss, nats": number} | ({"perplexity": lambda x: number(x, 1)} if language else {})
    keys = ("accuracy", "retention", "loss", "perplexity")
    rows = [[name, *(text(model.get(key)) for text, key in zip(columns.values(), keys, strict=False))] for name, model in models.items()]
    extra = figures.get("by_class", {})
    head = ["", *columns]
    for key, title in (("macro_f1", "macro F1"), ("balanced_accuracy", "balanced accuracy")):
        if extra:
            head.append(title)
            rows = [[*row, percent(extra[key].get(row[0]))] for row in rows]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    gap = figures["gap_closed"]
    shares = [f"{percent(gap[key], 0)} of the gap in {key}" for key in ("accuracy", "loss") if "value" in gap.get(key, {})]
    closed = f" From the {gap['from']} to the teacher, the student has gone {' and '.join(shares)}." if shares else ""
    return Grid(head, rows, f"In brackets 95 % intervals; “kept” is the accuracy as a share of the teacher's, paired.{closed}")


def _looked_at(figures: Mapping[str, Any]) -> list[Block]:
    if figures["rows"] >= figures["of_rows"]:
        return []
    return [Note(f"{count(figures['rows'])} of {count(figures['of_rows'])} held-out rows were looked at; `--report_rows` takes more.")]


def _groups(figures: Mapping[str, Any]) -> Grid:
    names = [name for name in (TEACHER, ALONE, figures["student"]) if name in _present(figures)]
    rows, empty = [], []
    for name, group in figures["groups"].items():
        if not group["positions"]:
            empty.append(f"{name} ({count(group['classes'])})")
            continue
        for model in names:
            found = group["models"][model]
            first = f"{name}: {group['limits']} labels" if model == names[0] else ""
            rows.append([first, count(group["positions"]) if first else "", model, percent(found["accuracy"]), number(found["loss"])])
    what = "tokens of the vocabulary" if figures["unit"] == "token" else "classes"
    sizes = ", ".join(f"{count(group['classes'])} {name}" for name, group in figures["groups"].items() if group["positions"])
    none = f" Not among held-out labels: {', '.join(empty)}." if empty else ""
    caption = f"Groups of {what} by how often each is a label of the training rows: {sizes}.{none} Loss in nats. {FEW}"
    return Grid([what, "held out", "", "accuracy", "loss"], rows, caption)


def _classes(figures: Mapping[str, Any]) -> list[Block]:
    found = by_class.worst_first(figures["by_class"], figures["student"])
    shown = [_row(each, figures) for each in found[:SHOWN]]
    head = ["class", "trained on", "held out", "precision", "recall", "F1"] + (["teacher's F1"] if TEACHER in figures["names"] else [])
    blocks: list[Block] = [Grid(head, shown, f"The student, class by class, the lowest F1 first{_of(len(shown), len(found))}. {FEW}")]
    if rest := found[SHOWN:]:
        blocks.append(Fold(f"The other {count(len(rest))} classes", _lines([head, *(_row(each, figures) for each in rest)])))
    if unseen := [each["name"] for each in figures["by_class"]["classes"] if not each["held_out"]]:
        blocks.append(
            Missing(
                f"{count(len(unseen))} {'class' if len(unseen) == 1 else 'classes'}", f"no held-out row is of {', '.join(unseen[:SHOWN])}"
            )
        )
    return blocks


def _lines(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _of(shown: int, there: int) -> str:
    return f"; {shown} of {there}" if shown < there else ""


def _row(each: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    ours = each["models"][figures["student"]]
    cells = [each["name"], count(each["trained"]), count(each["held_out"]), *(percent(ours[key]) for key in ("precision", "recall", "f1"))]
    return cells + ([percent(each["models"][TEACHER]["f1"])] if TEACHER in each["models"] else [])
