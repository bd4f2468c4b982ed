"""What each model costs where it is served, measured anew and in turn, beside its quality."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill import hub
from distill.report.costs import served, tradeoff
from distill.report.costs.cost import Candidate, Clocked, clock, cost_of, of_files
from distill.report.evidence import BEFORE, TEACHER, Evidence, NotMeasured, Observed, Subject
from distill.report.intervals import interval
from distill.report.page import plots
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.page.words import count, milliseconds, number, percent, ratio, size
from distill.report.sections.base import Section
from distill.types import Batch

ROUNDS, SECONDS, MANY = 20, 5.0, 8
LITTLE = 10**6  # bytes: less is the sampling's noise
CPU = torch.device("cpu")


class Cost(Section):
    """Quality, size, latency, throughput and energy of every model."""

    name: ClassVar[str] = "cost"
    title: ClassVar[str] = "Cost"
    question: ClassVar[str] = "How much smaller, faster and more frugal is the student where it is served?"
    order: ClassVar[int] = 50

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Time all models in turn, on held-out rows, one at a time and several at once."""
        one, many = _samples(evidence.batches)
        models: dict[str, dict[str, Any]] = {name: {"missing": why} for name, why in evidence.absent.items() if name != BEFORE}
        clocked: dict[str, Clocked] = {}
        rounds = ROUNDS
        for device, group in _groups(evidence, many, models).items():
            batches = [{name: value.to(device) for name, value in batch.items()} for batch in (one, many)]
            rounds, times = _timed(group, batches[0], batches[1])
            clocked |= times
            for name, candidate in group.items():
                found = cost_of(candidate, batches[0], len(many["input_ids"]), times[name]).as_dict()
                models[name] = found | _size(evidence.subjects[name], found) | _quality(evidence.observed, name) | {"device": device.type}
        models |= {name: _elsewhere(evidence, name) for name, subject in evidence.subjects.items() if subject.runtime}
        if not clocked:
            raise NotMeasured("no model of this run is in this process, and none has files that could be run")
        return {
            "student": evidence.student,
            "names": list(evidence.subjects),
            "unit": evidence.task.unit,
            "rounds": rounds,
            "batch": len(many["input_ids"]),
            "positions": many["input_ids"].shape[1],
            "threads": torch.get_num_threads(),
            "models": models,
            "ratios": _ratios(models, clocked, evidence.student),
        }

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """A sentence, quality against size and against latency, and all figures."""
        models = {name: model for name, model in figures["models"].items() if "missing" not in model}
        blocks: list[Block] = [_said(figures)]
        shown = {name: model for name, model in models.items() if "value" in model["accuracy"]}
        if len(shown) > 1:
            blocks.append(_picture(shown, plots.styles(figures["names"])))
        blocks.append(_grid(models, figures))
        blocks += [Missing(name, model["missing"]) for name, model in figures["models"].items() if "missing" in model]
        return blocks


def _samples(batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first row alone, and up to `MANY` rows, of the largest batch, as they are served."""
    largest = max(batches, key=lambda batch: len(batch["input_ids"]))
    asked = {name: value for name, value in largest.items() if value.ndim and name != "position_ids"} | served.inputs_of(largest)
    one, many = ({name: value[:size] for name, value in asked.items()} for size in (1, MANY))
    return one, many


def _groups(evidence: Evidence, batch: Batch, models: dict[str, dict[str, Any]]) -> dict[torch.device, dict[str, Candidate]]:
    """The models by where they run: an export runs on the CPU; those that cannot be timed go to `models` with the reason."""
    groups: dict[torch.device, dict[str, Candidate]] = {}
    for name, subject in evidence.subjects.items():
        if name == BEFORE or subject.runtime:
            continue
        device = evidence.device if subject.model is not None or name == TEACHER else CPU
        if why := _untimed(subject, {name: value.to(device) for name, value in batch.items()}):
            models[name] = {"missing": why}
        else:
            groups.setdefault(device, {})[name] = Candidate(partial(_run, subject), subject.model, subject.files)
    return groups


def _untimed(subject: Subject, batch: Batch) -> str:
    if subject.model is None and subject.files is None:
        return "it runs elsewhere, or is several models: there is neither one module nor files of it"
    with torch.no_grad():
        made = bool(served.all_outputs(subject.target(batch)))
    return "" if made else "it is looked up in a store, not run"


@torch.no_grad()
def _run(subject: Subject, batch: Batch) -> Tensor:
    return [served.logits(outputs) for outputs in served.all_outputs(subject.target(batch))][-1]


def _timed(group: Mapping[str, Candidate], one: Batch, many: Batch) -> tuple[int, dict[str, Clocked]]:
    """Time in as many rounds as there is time for, 3 to `ROUNDS`; two rounds before show how long one takes, and warm up."""
    start = time.perf_counter()
    before = clock(group, one, many, rounds=2, warm_up=0)
    rounds = int(np.clip(2 * SECONDS / (time.perf_counter() - start), 3, ROUNDS))
    found = clock(group, one, many, rounds, warm_up=1)
    for name, clocked in found.items():
        clocked.peak = max(clocked.peak, before[name].peak)  # a runtime with an arena takes it in the first round
    return rounds, found


def _elsewhere(evidence: Evidence, name: str) -> dict[str, Any]:
    """The figures of a model whose runtime is not here: all but those of its running."""
    subject = evidence.subjects[name]
    found = of_files(subject.files)
    return found | _size(subject, found) | _quality(evidence.observed, name) | {"runtime": subject.runtime, "device": CPU.type}


def _size(subject: Subject, found: Mapping[str, Any]) -> dict[str, Any]:
    if found["disk_bytes"]:
        return {"bytes": found["disk_bytes"], "bytes_source": "files"}
    if subject.model is not None:
        return {"bytes": round(hub.describe(subject.model)["megabytes"] * 1e6), "bytes_source": "weights in memory"}
    return {"bytes": None, "bytes_source": "not known"}


def _quality(observed: Observed, name: str) -> dict[str, Any]:
    columns, resampler = observed.models[name], observed.resampler
    return {
        "accuracy": interval(lambda: resampler.share(columns.correct(observed.labels).astype(np.float64))),
        "loss": interval(lambda: resampler.mean(columns.nll)),
    }


def _ratios(models: Mapping[str, Mapping[str, Any]], clocked: Mapping[str, Clocked], student: str) -> dict[str, Any]:
    """How many times the teacher takes what the student takes; of throughput how many times as much the student gives."""
    for name in (TEACHER, student):
        if name not in clocked:
            return {"missing": f"there is no figure of the {name} to compare"}
    theirs, ours = clocked[TEACHER], clocked[student]
    found: dict[str, Any] = {
        "latency": _ratio([wall for wall, _ in theirs.single], [wall for wall, _ in ours.single]),
        "throughput": _ratio(theirs.large, ours.large),
    }
    for key in ("bytes", "parameters", "flops", "joules"):
        above, below = models[TEACHER][key], models[student][key]
        found[key] = above / below if above and below else {"missing": f"the {key} of both are not known"}
    return found


def _ratio(theirs: list[float], ours: list[float], resamples: int = 2000) -> dict[str, float]:
    """The ratio of two medians over rounds with its 95 % interval: rounds are drawn with replacement, the same for both."""
    a, b = np.array(theirs), np.array(ours)
    drawn = np.random.default_rng(0).integers(0, len(a), (resamples, len(a)))
    low, high = np.percentile(np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1), [2.5, 97.5])
    return {"value": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def _said(figures: Mapping[str, Any]) -> Note:
    ratios, student = figures["ratios"], figures["models"].get(figures["student"], {})
    if "missing" in ratios:
        took = milliseconds(student.get("latency_ms"))
        return Note(f"{f'One row takes the student {took}; ' if took else ''}{ratios['missing']}.")
    latency, smaller = ratios["latency"], ratios["bytes"]
    fast = f"{ratio(latency)} as fast" if latency["value"] >= 1 else f"slower, at {ratio(latency)} of its speed"
    small = "of unknown size beside it" if isinstance(smaller, Mapping) else f"takes {percent(1 / smaller)} of its bytes"
    kept = [model["accuracy"].get("value") for model in (student, figures["models"][TEACHER])]
    keeps = f", and has {percent(kept[0] / kept[1])} of its accuracy" if kept[0] is not None and kept[1] else ""
    text = f"Beside the teacher the student is {fast} for one row at a time, {small}{keeps}."
    return Note(text, "good" if latency["low"] > 1 else "warning")


def _picture(models: Mapping[str, Mapping[str, Any]], looks: Mapping[str, plots.Style]) -> Picture:
    figures, fronts = [], []
    for key, scale, what in (("bytes", 1e6, "size, MB"), ("latency_ms", 1.0, "latency of one row, ms")):
        points = [tradeoff.Point(name, model[key] / scale, model["accuracy"]) for name, model in models.items() if model[key]]
        if points:
            figures.append(tradeoff.draw(points, what, "accuracy", looks))
            fronts.append(f"by {what.split(',')[0].split(' of')[0]} {', '.join(tradeoff.on_front(points))}")
    caption = f"Up and to the left is better; the grey line joins the models that no other beats: {'; '.join(fronts)}."
    return Picture(figures, "Accuracy of every model against its size and against its latency.", caption)


def _grid(models: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any]) -> Grid:
    at_once = f"rows/s, {figures['batch']} at once"
    head = [
        "",
        "accuracy",
        "loss",
        "parameters",
        "size",
        "time a row",
        "95th percentile",
        at_once,
        "peak memory",
        "J per 1,000 rows",
        "FLOP a row",
    ]
    sources = sorted({str(model["energy_source"]) for model in models.values() if not model.get("runtime")})
    caption = (
        f"Timed in turn in {figures['rounds']} rounds on rows of up to {figures['positions']} positions, with {figures['threads']} "
        f"thread{'s' * (figures['threads'] != 1)}; medians. Loss in nats a {figures['unit']}. Size of the weights' files, * in memory. "
        f"Energy: {'; '.join(sources)}. The interval of the speed is over these rounds; another machine gives another speed."
    )
    if elsewhere := sorted({model["runtime"] for model in models.values() if model.get("runtime")}):
        caption += f" What is for {' or '.join(elsewhere)}, which is not run here, is not timed."
    return Grid(head, [_row(name, model) for name, model in models.items()], caption)


def _row(name: str, model: Mapping[str, Any]) -> list[str]:
    counted, nonzero = model["parameters"], model["nonzero"]
    zeros = f", {percent(1 - nonzero / counted, 0)} zeros" if counted and nonzero is not None and nonzero < 0.995 * counted else ""
    return [
        name,
        percent(model["accuracy"]),
        number(model["loss"]),
        f"{count(model['parameters'])}{zeros}",
        f"{size(model['bytes'])}{'*' * (model['bytes_source'] == 'weights in memory')}",
        milliseconds(model["latency_ms"]),
        milliseconds(model["latency_p95_ms"]),
        count(model["throughput"]),
        "< 1 MB" if model["peak_bytes"] is not None and model["peak_bytes"] < LITTLE else size(model["peak_bytes"]),
        "" if model["joules"] is None else f"{model['joules']:,.1f}",
        count(model["flops"]),
    ]
