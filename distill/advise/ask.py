"""What `distill advise` does: looks at the model and the machine, decides, and says it."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.advise import blocks, budget, machine, model, quality, recipes, show, training
from distill.advise.decide import decide, shown
from distill.advise.forms import Forms, Measured
from distill.advise.known import STUDENTS
from distill.advise.parts import Advice, Budget, Figure, Situation, Target
from distill.report import tables
from distill.report.costs import cost
from distill.report.files import write_json, write_text
from distill.types import ConfigError

WIDTH = 110
SECONDS = 30.0


@dataclass(frozen=True)
class Question:
    """What a person asks; the options of the command.

    Attributes:
        teacher: folder or hub id.
        target: what must become smaller, or must not be lost.
        budget: how far, with its unit.
        task: `causal-lm` or `classification`; None to guess.
        hours: that there are for training.
        tokens: to train on; None for a rule of thumb.
        length: tokens of a row.
        data: a text; None to measure on random ids.
        tflops: of a GPU that will train; None for this machine.
        gpus: how many.
        out: file of the figures; None to print alone.
    """

    teacher: str
    target: Target
    budget: str
    task: str | None
    hours: float | None
    tokens: int | None
    length: int
    data: str | None
    tflops: float | None
    gpus: int
    out: str | None


def answer(q: Question) -> Advice:
    """Measure, decide, print, and write what was asked for.

    Raises:
        ConfigError: an option has a value that cannot work.
        DataError: the text is too short.
    """
    _check(q)
    teacher = model.read(q.teacher, q.task)
    budget.parse(q.budget, q.target, teacher.task_name, None)  # a mistake is said before anything is measured
    path = Path(q.out).with_suffix(".yaml") if q.out else Path("advice.yaml")
    if q.out and path.exists():
        raise ConfigError(f"--out: {path} exists, and you may have changed it; give another name, or remove it")
    length, device = model.length_of(teacher, q.length), machine.device()
    losses = {} if q.data is None else quality.rounded(teacher.task, teacher.name, q.data, length)
    whole = model.timed(teacher, length, device)
    layer_ms, missing = blocks.measure(teacher.task, teacher.config, length, device, None if whole is None else whole[0], _rounds(whole))
    rate = training.promised(q.tflops, q.gpus) if q.tflops else training.rate(teacher.task, teacher.config, length, device)
    measured = Measured(layer_ms.pop(blocks.WHOLE, None), layer_ms, rate, losses, length)
    made = Forms(teacher, measured, q.tokens)
    forms = made.all(q.target)
    if made.reason:
        missing["cutting a student out of it"] = made.reason
    elif not made.pruning_gains and q.target == "latency":
        missing["pruning neurons"] = "a layer with half of them is no faster on this machine"
    limit = _limit(q, teacher, forms[0].ms)
    gains = {name: Figure(gain, True, "two layers") for name, gain in blocks.gains(layer_ms).items()}
    s = Situation(q.target, limit, q.hours, forms, gains, missing)
    advice = decide(s)
    _say(q, teacher, s, advice, None if whole is None else whole[1], rate, length, path)
    return advice


def _rounds(whole: tuple[cost.Run, cost.Cost] | None) -> int:
    """As many as half a minute of the whole model allows, two calls a round."""
    return blocks.ROUNDS if whole is None else max(3, min(blocks.ROUNDS, int(SECONDS / (2e-3 * whole[1].latency_ms))))


def _check(q: Question) -> None:
    for name, value in (("hours", q.hours), ("tokens", q.tokens), ("tflops", q.tflops)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} must be above 0, got {value:g}; leave it out where it does not matter")
    if q.length < 2 or q.gpus < 1:
        raise ConfigError(f"--length must be at least 2 and --gpus at least 1, got {q.length} and {q.gpus}")


def _limit(q: Question, teacher: model.Teacher, ms: Figure | None) -> Budget:
    whole = teacher.bytes.value if q.target == "size" else None if ms is None else ms.value
    return budget.parse(q.budget, q.target, teacher.task_name, whole)


def _say(
    q: Question, teacher: model.Teacher, s: Situation, advice: Advice, whole: cost.Cost | None, rate: Figure, length: int, path: Path
) -> None:
    rows = _about(teacher, s, whole, rate, length)
    tables.show(tables.banner(f"Advice for {q.teacher}", rows))
    tables.show(show.forms_table(s, advice))
    print(_wrapped(advice.headline) + "\n")
    commands = [recipes.commands(step, q.teacher, str(path), path.stem) for step in advice.steps]
    print(_wrapped(show.steps_text(advice, commands)))
    form = recipes.of_advice(advice)
    text = (
        None if form is None else recipes.config(form, q.teacher, s.forms[0].sizes, teacher.task_name, length, machine.device() == "cuda")
    )
    if text is not None:
        print(f"\n{'In ' + str(path) if q.out else 'Save this as ' + str(path)}:\n\n{textwrap.indent(text, '    ')}")
    if advice.ruled_out:
        print("Not taken:\n" + _wrapped(show.ruled_out_text(advice)))
    if any(step.form.kind in ("distil", "combine", "prune") for step in advice.steps):
        print("What other students kept, of other models:\n" + _wrapped("\n".join(f"  {line}" for line in STUDENTS)))
    if q.out:
        _write(Path(q.out), path, s, advice, rows, commands, text)


def _about(teacher: model.Teacher, s: Situation, whole: cost.Cost | None, rate: Figure, length: int) -> dict[str, str]:
    w, keep = teacher.weights, s.forms[0]
    sizes = f"{w.parameters:,} parameters: {w.blocks:,} in layers, {w.tables:,} in embeddings"
    speed = "it does not fit into memory here: times are those of two layers"
    if whole is not None:
        ms = keep.ms.value if keep.ms is not None else whole.latency_ms
        speed = f"{shown(ms, 'ms')} a row of {length} tokens, {whole.throughput:.3g} rows a second at 8, measured"
    fast = ", ".join(f"{name} {gain.value:.2f} ×" for name, gain in sorted(s.gains.items(), key=lambda item: -item[1].value))
    return {
        "model": f"{teacher.config.model_type}, {teacher.task_name} · {sizes}",
        **({"head": "its config names none for this task: train one first, e.g. teacher_bert.yaml"} if teacher.headless else {}),
        "files": f"{shown(keep.bytes.value, 'bytes')}, {'measured' if keep.bytes.measured else 'counted'}",
        "speed": speed,
        "two layers of it": f"{fast} · measured, × float32 in PyTorch",
        "training": f"{rate.value / 1e12:.3g} TFLOP/s, {'measured' if rate.measured else 'estimated'}: {rate.basis}",
        "budget": f"{s.target}: {s.budget.text}"
        + (f" of the teacher, {shown(s.budget.limit, s.budget.unit)}" if s.budget.text.endswith("%") else "")
        + ("" if s.hours is None else f", in {shown(s.hours, 'hours')}"),
        **machine.features(),
    }


def _write(out: Path, path: Path, s: Situation, advice: Advice, rows: dict[str, str], commands: list[list[str]], text: str | None) -> None:
    steps = [
        {"what": step.what, "why": step.why, "form": show.as_dict(step.form), "commands": typed}
        for step, typed in zip(advice.steps, commands, strict=True)
    ]
    write_json(
        out,
        {
            "leaf": advice.leaf,
            "headline": advice.headline,
            "target": s.target,
            "budget": {"limit": s.budget.limit, "unit": s.budget.unit, "text": s.budget.text},
            "hours": s.hours,
            "about": rows,
            "steps": steps,
            "forms": [show.as_dict(form) for form in s.forms],
            "gains": {name: gain.as_dict() for name, gain in s.gains.items()},
            "ruled_out": advice.ruled_out,
            "threads": torch.get_num_threads(),
        },
    )
    if text is not None:
        write_text(path, text)
    print(f"Figures are in {out}" + ("" if text is None else f", the YAML in {path}"))


def _wrapped(text: str) -> str:
    """Lines of at most `WIDTH`, indented like their beginning; commands stay whole, to be copied."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += [line] if "$ " in line else textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "\n".join(lines)
