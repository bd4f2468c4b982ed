"""How the student was trained: what each term did, whether it converged, and what went wrong on the way."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from distill.report.costs import served
from distill.report.evidence import TEACHER, Evidence
from distill.report.history import curves
from distill.report.history.convergence import ending, pull, voices
from distill.report.history.series import Series, as_lists, restarts, series, step_seconds
from distill.report.page.blocks import Block, Grid, Missing, Note
from distill.report.page.words import number, percent, size
from distill.report.sections.base import Section

TIMES = 3  # that the teacher is asked to know its seconds


class Training(Section):
    """Curves of the objective and its terms, of validation, and of the machine."""

    name: ClassVar[str] = "training"
    title: ClassVar[str] = "Training"
    question: ClassVar[str] = "Did training converge, and did every term of the objective do its part?"
    order: ClassVar[int] = 60

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Read the log, and time the teacher."""
        found = series(evidence.log)
        terms = terms_of(evidence.run, found)
        skipped = found.get("train/skipped_steps")
        return {
            "steps": evidence.run.get("steps"),
            "terms": terms,
            "end": ending(found),
            "pull": pull(found, terms),
            "step_seconds": step_seconds(evidence.log) or {"missing": "no two logs in a row are of training alone"},
            "tokens_per_s": _second_half(found.get("tokens_per_s")),
            "teacher_share": teacher_share(evidence, found.get("tokens_per_s")),
            "skipped_steps": evidence.run.get("skipped_steps", int(skipped.values[-1]) if skipped else 0),
            "restarts": restarts(evidence.log),
            "checkpoints": _checkpoints(evidence.folder / "checkpoints"),
            "compression": [
                {name: value for name, value in each.items() if not isinstance(value, dict)} for each in evidence.run.get("compression", [])
            ],
            "not_finite": {key: lost for key, curve in found.items() if (lost := len(curve.steps) - len(curve.finite.steps))},
            "curves": {key: as_lists(curve) for key, curve in found.items()},
        }

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """A sentence, the curves, and what happened on the way."""
        if not figures["curves"]:
            return [Missing("the curves", "the run has left no metrics.jsonl, or an empty one"), _grid(figures)]
        loud = voices(figures["pull"])
        lost = sum(figures["not_finite"].values())
        gaps = [f"{lost:,} logged value{'s were' if lost > 1 else ' was'} not finite, and left out of the curves."] if lost else []
        well = figures["end"].get("state") == "settled" and not loud and not lost
        note = Note(" ".join([figures["end"]["says"], *loud, *gaps]), "good" if well else "warning")
        return [note, *curves.pictures(figures), _grid(figures)]


def terms_of(run: Mapping[str, Any], found: Mapping[str, Series]) -> list[str]:
    """The terms of the objective: from the report of the run, or from what was logged of them."""
    if run.get("losses"):
        return list(run["losses"])
    return [key.removeprefix("train/").removesuffix("_weighted") for key in found if key.startswith("train/") and key.endswith("_weighted")]


def teacher_share(evidence: Evidence, speed: Series | None) -> dict[str, Any]:
    """Which part of a training step the teacher took, up to its head, as it was logged.

    Of a run that did not log it an estimate: its seconds for a token now, on held-out rows, times the tokens a second of training; right
    if the run was one process on this machine.
    """
    if (logged := series(evidence.log).get("teacher_share")) is not None:
        return {"value": _second_half(logged), "estimate": False}
    subject = evidence.subjects.get(TEACHER)
    if subject is None or speed is None or not len(speed.finite.steps):
        return {"missing": "there is no teacher here to ask" if subject is None else "tokens a second were not logged"}
    if torch.cuda.device_count() > 1 or evidence.config.get("trainer", {}).get("num_nodes", 1) != 1:
        return {"missing": "several processes may have trained, and their step is not this one's"}
    batch = {name: value.to(evidence.device) for name, value in max(evidence.batches, key=lambda each: each["input_ids"].numel()).items()}
    seconds = []
    for _ in range(1 + TIMES):
        start = time.perf_counter()
        with torch.no_grad():
            asked = [served.logits(outputs) for outputs in served.all_outputs(subject.target(batch))]
            asked[-1].flatten()[0].item() if asked else None  # waits for the device
        seconds.append(time.perf_counter() - start)
    tokens = int(served.inputs_of(batch)["attention_mask"].sum())
    share = median(seconds[1:]) / tokens * _second_half(speed)
    if share >= 1:
        return {"missing": f"asked now it takes {share:.1f} times a step of training: this machine is slower, or busy"}
    return {"value": share, "estimate": True}


def _second_half(speed: Series | None) -> Any:
    """The median over the second half: the first steps wait for caches."""
    if speed is None or not len(speed.finite.steps):
        return {"missing": "tokens a second were not logged"}
    values = speed.finite.values
    return float(median(values[len(values) // 2 :].tolist()))


def _checkpoints(folder: Path) -> dict[str, Any]:
    kept = [path for path in folder.glob("*.ckpt") if not path.name.startswith(".")]
    files = [file for path in kept for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return {"count": len(kept), "bytes": sum(file.stat().st_size for file in files)}


def _grid(figures: Mapping[str, Any]) -> Grid:
    share, kept, pulled = figures["teacher_share"], figures["checkpoints"], figures["pull"]
    seconds, speed = figures["step_seconds"], figures["tokens_per_s"]
    rows = [
        ["optimizer steps", f"{figures['steps']:,}" if figures["steps"] is not None else ""],
        ["seconds a step", number(seconds, 3) or f"not known: {seconds['missing']}"],
        ["tokens a second", f"{speed:,.0f}" if isinstance(speed, float) else f"not known: {speed['missing']}"],
        [
            "teacher's share of a step",
            (percent(share["value"], 0) if not share["estimate"] else f"≈ {percent(share['value'], 0)}, estimated")
            if "value" in share
            else f"not known: {share['missing']}",
        ],
        ["steps skipped, not finite", f"{figures['skipped_steps']:,}"],
        ["restarts that repeated steps", f"{figures['restarts']:,}"],
        ["checkpoints kept", f"{kept['count']:,}, {size(kept['bytes'])} together" if kept["count"] else "0"],
    ]
    if "shares" in pulled:
        shares = " · ".join(f"{term} {percent(share, 0)}" for term, share in pulled["shares"].items())
        rows.append([f"pull of the terms, at the {pulled['at']}", shares])
    rows += [
        [f"compression: {each.get('class', '')}", " · ".join(str(line) for line in each.get("settled", []))]
        for each in figures["compression"]
    ]
    caption = (
        "The teacher's share is its forward pass up to its head; an estimate is its time for a token now, times the tokens a second. "
        "The pull of a term is weight × gradient norm, over the second half."
    )
    return Grid(["", "figure"], rows, caption)
