"""What a language model can do: benchmarks of lm-evaluation-harness, and answers after `####` that are right to the digit."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from distill.metrics.answers import exact_match, final_answer
from distill.metrics.bootstrap import Resampler
from distill.report.evidence import TEACHER, Evidence, NotMeasured
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.page.words import number, percent
from distill.report.probes import generate, harness
from distill.report.sections.base import Section
from distill.types import DataError

QUESTIONS = 32
FIRST = ("acc_norm", "acc", "exact_match")  # which metric stands for a task, where it has it
SHARES = ("acc", "acc_norm", "exact_match", "mc1", "mc2", "f1", "pass@1")
ANSWERS = "answers after ####"
_ALONE = {"missing": "teacher and student were not both measured"}


class Tasks(Section):
    """Benchmarks, and exact match."""

    name: ClassVar[str] = "tasks"
    title: ClassVar[str] = "Tasks: what the models can do"
    question: ClassVar[str] = "Does the student solve what its teacher solves?"
    order: ClassVar[int] = 15

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Run what was asked for, and what the held-out rows ask."""
        if evidence.task.unit != "token":
            raise NotMeasured("tasks are for language models; what a classifier is for stands in the chapter on quality")
        answers = _or_missing(_answers, evidence)  # first: they take seconds, benchmarks hours
        found = {"benchmarks": _or_missing(_benchmarks, evidence), "answers": answers}
        if all("missing" in part for part in found.values()):
            raise NotMeasured(". ".join(part["missing"] for part in found.values()))
        return {"names": [*evidence.subjects], "student": evidence.student, **found}

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """Where the student is behind, the differences, the table."""
        rows = _rows(figures)
        blocks: list[Block] = [_sentence(rows, figures["student"])]
        if compared := _compared(rows):
            blocks.append(Picture(_picture(compared, figures), _alt(compared), _CAPTION))
        if rows:
            blocks.append(_table(rows, figures))
        return blocks + _missing(figures)


def _or_missing(measure: Any, evidence: Evidence) -> dict[str, Any]:
    try:
        found: dict[str, Any] = measure(evidence)
    except NotMeasured as error:
        return {"missing": str(error)}
    return found


def _benchmarks(evidence: Evidence) -> dict[str, Any]:
    asked, limit = evidence.config.get("tasks"), evidence.config.get("task_limit")
    if not asked:
        raise NotMeasured(
            "No benchmark was asked for: set `tasks` to names of lm-evaluation-harness, e.g. [arc_easy, hellaswag], or to a folder of its "
            "YAMLs, and `task_limit` to examples of each"
        )
    benches = harness.Harness(asked, limit)
    models = {name: subject.model for name, subject in evidence.subjects.items() if subject.model is not None}
    tasks: dict[str, Any] = {}
    for name in benches.names:
        try:
            benches.check(name)
        except NotMeasured as error:
            tasks[name] = {"missing": str(error)}
            continue
        scores: dict[str, harness.Scores] = {}
        failed = {}
        for who, model in models.items():
            try:
                scores[who] = benches.scores(name, model, evidence.data.tokenizer)
            except NotMeasured as error:
                failed[who] = str(error)
        tasks |= _of_tasks(name, scores, failed, evidence.student)
    return {"limit": limit, "tasks": tasks}


def _of_tasks(asked: str, scores: Mapping[str, harness.Scores], failed: Mapping[str, str], student: str) -> dict[str, Any]:
    if not scores:
        return {asked: {"missing": next(iter(failed.values()), "there is no model of torch to ask")}}
    found: dict[str, Any] = {}
    for task in dict.fromkeys(task for of_model in scores.values() for task in of_model):
        metrics = dict.fromkeys(metric for of_model in scores.values() for metric in of_model.get(task, {}))
        found[task] = {"metrics": {}, "failed": dict(failed)}
        for metric in metrics:
            of_models = {who: of_model[task][metric] for who, of_model in scores.items() if metric in of_model.get(task, {})}
            ours, theirs = of_models.get(student), of_models.get(TEACHER)
            found[task]["metrics"][metric] = {
                "models": {who: harness.interval(score) for who, score in of_models.items()},
                "difference": harness.difference(ours, theirs) if ours and theirs else _ALONE,
                "examples": max(len(score.examples) for score in of_models.values()),
            }
    return found


def _answers(evidence: Evidence) -> dict[str, Any]:
    data = evidence.data
    asked = generate.questions(evidence.batches, data.tokenizer, data.max_length, QUESTIONS)
    if not asked:
        raise NotMeasured("No held-out completion gives an answer after ####, so no exact match either")
    right = {}
    for name in (TEACHER, evidence.student):
        subject = evidence.subjects.get(name)
        if subject is not None and subject.model is not None:
            texts = generate.greedy(subject.model, asked, data.tokenizer, data.pad_id, data.max_length, evidence.device)
            right[name] = exact_match([final_answer(text) for text in texts], [question.answer for question in asked])
    if not right:
        raise NotMeasured("Neither teacher nor student is a module of torch in this process that could write answers")
    resampler = Resampler(np.arange(len(asked)))
    try:
        figures = {name: resampler.share(column).as_dict() for name, column in right.items()}
        both = resampler.difference(right[evidence.student], right[TEACHER]).as_dict() if len(right) == 2 else None
    except DataError as error:
        raise NotMeasured(str(error)) from error
    return {"models": figures, "difference": both or _ALONE, "examples": len(asked)}


def _rows(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One row a task and metric, by its name; `first` is true for the metric that stands for the task."""
    rows: dict[str, dict[str, Any]] = {}
    for task, found in figures["benchmarks"].get("tasks", {}).items():
        metrics = found.get("metrics", {})
        first = next((metric for metric in FIRST if metric in metrics), next(iter(metrics), None))
        for metric, row in metrics.items():
            rows[f"{task}, {metric}"] = {**row, "first": metric == first, "share": metric.split(",")[0] in SHARES}
    if "missing" not in figures["answers"]:
        rows[ANSWERS] = {**figures["answers"], "first": True, "share": True}
    return rows


def _compared(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Student less teacher, of the metric that stands for each task, where it is a share."""
    return {name: row["difference"] for name, row in rows.items() if row["first"] and row["share"] and "missing" not in row["difference"]}


def _sentence(rows: Mapping[str, Any], student: str) -> Note:
    compared = _compared(rows)
    if not compared:
        return Note("Nothing was measured of both, teacher and student, that could be compared.", "plain")
    behind = [name for name, gap in compared.items() if gap["high"] < 0]
    worst = min(compared, key=lambda name: compared[name]["value"])
    both = {who: percent(_value(rows[worst]["models"][who]), 1) for who in (TEACHER, student)}
    at_worst = f"{worst}: {both[student]}, its teacher {both[TEACHER]}"
    if behind:
        of = f"On {len(behind)} of {len(compared)} tasks the {student} is" if len(compared) > 1 else f"The {student} is"
        return Note(f"{of} behind its teacher by more than chance; it is furthest behind at {at_worst}.", "warning")
    lowest = -100 * min(gap["low"] for gap in compared.values())
    if lowest <= 0:
        return Note(f"The {student} is ahead of its teacher everywhere; least at {at_worst}.", "good")
    tasks = "any of these tasks" if len(compared) > 1 else "this task"
    return Note(
        f"The examples do not show that the {student} is behind its teacher at {tasks}; the lowest is {at_worst}. They are too few to rule "
        f"out a gap of {lowest:.0f} points.",
        "plain",
    )


def _value(figure: Any) -> float:
    return float(figure["value"] if isinstance(figure, Mapping) else figure)


def _picture(compared: Mapping[str, Mapping[str, float]], figures: Mapping[str, Any]) -> Figure:
    points = {name: {key: 100 * value for key, value in gap.items()} for name, gap in compared.items()}
    look = plots.styles(figures["names"])[figures["student"]]
    figure, (axes,) = plots.new(plots.WIDEST, 1.1 + 0.55 * len(points))
    plots.dots_with_intervals(axes, points, dict.fromkeys(points, look), "{:+.1f}".format)
    axes.axvline(0, color=plots.MUTED, linewidth=1)
    axes.set_xlabel("student − teacher, points")
    return figure


_CAPTION = (
    "How far the student is from its teacher, task by task, with 95 % intervals over the same examples for both. Left of the line it is "
    "behind; an interval that does not reach the line is more than chance."
)


def _alt(compared: Mapping[str, Mapping[str, float]]) -> str:
    gaps = [f"{name} {100 * gap['value']:+.1f} points" for name, gap in compared.items()]
    return f"Dots with intervals, the student less its teacher: {'; '.join(gaps)}."


def _table(rows: Mapping[str, Any], figures: Mapping[str, Any]) -> Grid:
    names = [name for name in figures["names"] if any(name in row["models"] for row in rows.values())]
    cells = []
    for name, row in rows.items():
        form = percent if row["share"] else number
        gap, scale = row["difference"], 100 if row["share"] else 1
        points = "" if "missing" in gap else f"{scale * gap['value']:+.1f} ({scale * gap['low']:+.1f} – {scale * gap['high']:+.1f})"
        examples = f"{row['examples']:,}" if row["examples"] else ""
        cells.append([name, *(form(row["models"].get(who)) for who in names), points, examples])
    limit = figures["benchmarks"].get("limit")
    how = ["Scores with 95 % intervals: over examples where a score is their mean, else of the harness's standard error."]
    how += [f"Of every benchmark {limit:g} examples at most were taken."] if limit and limit >= 1 else []
    how += [
        f"{ANSWERS[0].upper()}{ANSWERS[1:]} are what a model writes, the likeliest token every time, and right if the number is the "
        "solution's."
    ] * (ANSWERS in rows)
    return Grid(["", *names, "student − teacher, points", "examples"], cells, " ".join(how))


def _missing(figures: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for what, part in (("benchmarks", figures["benchmarks"]), ("exact match", figures["answers"])):
        if "missing" in part:
            blocks.append(Missing(what, part["missing"]))
    for task, found in figures["benchmarks"].get("tasks", {}).items():
        if "missing" in found:
            blocks.append(Missing(task, found["missing"]))
        blocks += [Missing(f"{task}, {who}", why) for who, why in found.get("failed", {}).items()]
    return blocks
