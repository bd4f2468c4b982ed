"""What is shown of several runs side by side, each out of what its report has left in its folder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.report.costs import tradeoff
from distill.report.history.curves import line_plot
from distill.report.evidence import TEACHER, Floats
from distill.report.intervals import interval
from distill.report.runs.finished import Finished
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.page.words import count, duration, milliseconds, number, percent, size
from distill.report.runs.paired import MEASURES, Measure, Student, differences, mcnemar, mean, resampler, sentence
from distill.report.rows import Rows
from distill.report.history.series import from_lists
from distill.types import DataError

ABSENT = object()
SEPARATOR = ": "  # between a run and a model of it


# ---- figures


def headlines(runs: Sequence[Finished]) -> list[Block]:
    """All headline figures, a column a run."""
    quality = [_quality(run) for run in runs]
    lines = [[label, *(each.get(label, "") for each in quality)] for label in dict.fromkeys(label for each in quality for label in each)]
    lines += [[label, *(_chapter(run, path, key, shown) for run in runs)] for label, path, key, shown in _CHAPTERS]
    lines += [
        ["optimizer steps", *(count(run.report.get("steps")) for run in runs)],
        ["training took", *(duration(_model(run).get("seconds")) for run in runs)],
    ]
    grid = Grid(["", *(run.name for run in runs)], [line for line in lines if any(line[1:])], "Of the final students, with 95 % intervals.")
    return [Note(_leader(runs)), grid, *(Missing(f"intervals of {run.name}", run.rows) for run in runs if isinstance(run.rows, str))]


Shown = Callable[[Any], str]
_CHAPTERS: tuple[tuple[str, tuple[str, ...], str, Shown], ...] = (  # of the student: where its chapter has it, and by which key
    ("too certain by", ("calibration", "models"), "overconfidence", percent),
    ("ECE", ("calibration", "models"), "ece", percent),
    ("accepted as the teacher's draft", ("fidelity", "drafting"), "acceptance", percent),
    ("parameters", ("cost", "models"), "parameters", count),
    ("size", ("cost", "models"), "bytes", size),
    ("time a row", ("cost", "models"), "latency_ms", milliseconds),
    ("rows a second", ("cost", "models"), "throughput", "{:,.0f}".format),
    ("J per 1,000 rows", ("cost", "models"), "joules", "{:,.1f}".format),
)


def _quality(run: Finished) -> dict[str, str]:
    """By label: with intervals where the rows are known, else as the run printed them."""
    ours = run.same_rows
    if ours is None:
        model = _model(run)
        shown = {"accuracy": percent(model.get("accuracy")), "loss": number(model.get("loss"), 4, "nats")}
        shown |= {"KL to its teacher": number(model.get("kl"), 4, "nats"), "agreement with its teacher": percent(model.get("agreement"))}
        return shown | {"teacher's accuracy kept": percent(model.get("retention"))}
    found = {}
    for figure, m in MEASURES.items():
        if figure in ours.sums:
            found[m.label] = _shown(ours.rows, ours.sums[figure], m)
    if TEACHER in ours.rows.sums:
        theirs = ours.rows.sums[TEACHER]["correct"]
        kept = interval(lambda: resampler(ours.rows).ratio(ours.sums["correct"][ours.rows.count > 0], theirs[ours.rows.count > 0]))
        found["teacher's accuracy kept"] = percent(kept)
    return found


def _shown(of: Rows, figure: Floats, m: Measure) -> str:
    """With its interval; alone where there is one row."""
    found = interval(lambda: mean(of, figure, share=m.unit == "points"))
    value = found if "value" in found else float(figure.sum() / of.count.sum())
    return percent(value) if m.unit == "points" else number(value, m.digits, m.unit)


def _model(run: Finished) -> Mapping[str, Any]:
    return run.report.get("models", {}).get(run.student, {})


def _chapter(run: Finished, path: tuple[str, ...], key: str, shown: Shown) -> str:
    value = run.found(*path, run.student, key)
    return "" if value is None else shown(value)


def _accuracy(run: Finished) -> float | None:
    """As in the table below: of the rows of the report, else as the run printed it."""
    ours = run.same_rows
    value = _model(run).get("accuracy") if ours is None else ours.sums["correct"].sum() / ours.rows.count.sum()
    return None if value is None else float(value)


def _leader(runs: Sequence[Finished]) -> str:
    found = {run.name: _accuracy(run) for run in runs}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return "No run has measured the accuracy of its student."
    best = max(known, key=lambda name: known[name])
    return f"{best} has the highest accuracy, {percent(known[best])}; whether that is more than chance is said under Differences."


# ---- differences


def tests(runs: Sequence[Finished]) -> list[Block]:
    """Every other run against the first."""
    blocks: list[Block] = []
    for run in runs[1:]:
        one, other = runs[0].same_rows, run.same_rows
        if one is None or other is None:
            blocks.append(Missing(f"{runs[0].name} against {run.name}", "one of them has not kept what its student said row by row"))
        else:
            blocks += _against(runs[0], one, run, other)
    return blocks


def _against(a: Finished, one: Student, b: Finished, other: Student) -> list[Block]:
    try:
        found = differences(one, other)
    except DataError as error:
        return [Missing(f"{a.name} against {b.name}", str(error))]
    same = one.rows.digest == other.rows.digest
    how = (
        "On the same held-out rows, paired: the same 2,000 resamples for both."
        if same
        else "They were measured on different held-out rows: nothing is paired, and part of a difference may be the rows'."
    )
    teachers = a.found("provenance", "weights", TEACHER), b.found("provenance", "weights", TEACHER)
    told = (
        ""
        if "kl" not in found or teachers[0] == teachers[1] is not None
        else " They may have had different teachers: KL and agreement are each beside its own."
    )
    lines = [[MEASURES[figure].label, sentence(figure, interval, a.name, b.name)] for figure, interval in found.items()]
    if same and one.rows.single:
        lines.append(["McNemar's exact test", _mcnemar(one, other, a.name, b.name)])
    note = Note(f"Accuracy: {sentence('correct', found['correct'], a.name, b.name)}. {how}{told}", "plain" if same else "warning")
    return [
        note,
        Grid(
            [f"{b.name} against {a.name}", "difference"], lines, "95 % intervals of the bootstrap over rows, each of one comparison alone."
        ),
    ]


def _mcnemar(one: Student, other: Student, a: str, b: str) -> str:
    only_a, only_b, p = mcnemar(one.sums["correct"], other.sums["correct"])
    return f"p = {p:.2g}: {a} alone is right on {only_a:,} rows, {b} alone on {only_b:,}"


# ---- cost


def tradeoffs(runs: Sequence[Finished]) -> list[Block]:
    """Quality against size and latency, all models of all runs."""
    models = _models(runs)
    if len(models) < 2:
        return [Missing("quality against cost", "fewer than two models of these runs were timed")]
    look = plots.styles([TEACHER, *(run.name for run in runs)])
    looks = {name: look[name.partition(SEPARATOR)[0]] for name in models}
    figures, fronts = [], []
    for key, scale, what, short in (("bytes", 1e-6, "size, MB", "size"), ("latency_ms", 1.0, "latency of one row, ms", "latency")):
        points = [tradeoff.Point(name, scale * model[key], model["accuracy"]) for name, model in models.items() if model[key]]
        if points:
            figures.append(tradeoff.draw(points, what, "accuracy", looks))
            fronts.append(f"by {short} {', '.join(tradeoff.on_front(points))}")
    caption = f"Up and to the left is better; the grey line joins the models that no other beats: {'; '.join(fronts)}."
    picture = Picture(figures, "Accuracy of all models of all runs against their size and their latency.", caption)
    machines = {str(run.found("provenance", "environment", "cpu")) + str(run.found("provenance", "environment", "gpus")) for run in runs}
    said = "Latencies were taken at different times, each run's with its own report; only those of one run were timed in turn."
    if len(machines) > 1:
        return [Note(f"The runs were timed on different machines, so that their latencies cannot be compared. {said}", "warning"), picture]
    return [Note(said), picture]


def _models(runs: Sequence[Finished]) -> dict[str, Mapping[str, Any]]:
    """All that were timed and measured, by run and name; a teacher that several runs share is shown once."""
    found: dict[str, Mapping[str, Any]] = {}
    teachers = {run.name: run.found("provenance", "weights", TEACHER) for run in runs}
    shown = set()
    for run in runs:
        for name, model in (run.found("cost", "models") or {}).items():
            weights = teachers[run.name] if name == TEACHER else None
            if "missing" in model or "missing" in model["accuracy"] or (weights is not None and weights in shown):
                continue
            shown.add(weights)
            shared = weights is not None and set(teachers.values()) == {weights}
            found[name if shared else f"{run.name}{SEPARATOR}{name}"] = model
    return found


# ---- training


def curves(runs: Sequence[Finished]) -> list[Block]:
    """Validation and training loss over the steps, a line a run."""
    looks, figures = plots.styles(run.name for run in runs), []
    for key, unit, scale in (
        ("val/loss", "validation loss, nats", 1.0),
        ("val/accuracy", "validation accuracy, %", 100.0),
        ("train/loss", "objective", 1.0),
    ):
        kept = {run.name: run.found("training", "curves", key) for run in runs}
        lines = {name: from_lists(lists) for name, lists in kept.items() if lists and lists[0]}
        if lines:
            figures.append(line_plot(lines, unit, scale, looks))
    said: list[Block] = [Note(" ".join(f"{run.name}: {end}" for run in runs if (end := run.found("training", "end", "says"))))]
    if not figures:
        return [Missing("curves", "no run has logged any")]
    caption = "The objective is each run's own: only where the terms and weights are the same can it be compared."
    return [*said, Picture(figures, "Validation loss, validation accuracy and objective of the runs over the steps.", caption)]


# ---- configuration


def settings(runs: Sequence[Finished]) -> list[Block]:
    """The keys that differ, the runs' names left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "name")
    lines = []
    for key in keys:
        values = [run.config.get(key, ABSENT) for run in runs]
        if any(value != values[0] for value in values) and not all(value in (ABSENT, None) for value in values):
            lines.append([key.replace(".init_args", ""), *(_text(value) for value in values)])
    if not lines:
        return [Note("The configurations are the same but for the names.")]
    note = Note(f"{len(lines)} of {len(keys)} keys {'differs' if len(lines) == 1 else 'differ'}.")
    return [note, Grid(["key", *(run.name for run in runs)], lines, "Of the resolved configurations; all other keys are the same.")]


def _text(value: Any) -> str:
    if value is ABSENT:
        return "—"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
