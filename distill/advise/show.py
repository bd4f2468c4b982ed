"""Advice for the terminal: the situation, the forms side by side, what to do, what to type."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from distill.advise.decide import meets, shown
from distill.advise.parts import Advice, Figure, Form, Loss, Situation

MEASURED, ESTIMATED = "", "~"
ROWS = 3  # of forms that differ in their sizes alone


def forms_table(s: Situation, advice: Advice) -> Table:
    """One row a form; the recommended ones are marked ▸, estimated figures ~."""
    table = Table(
        title="What it can become (~ estimated, else measured here)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True, max_width=40)
    for head in ("params", "files", "of it", "ms", "×", "training", "loss", "meets"):
        table.add_column(head, justify="right", no_wrap=True)
    chosen = [step.form for step in advice.steps]
    for form in listed(s, chosen):
        mark = "▸" if form in chosen else ""
        table.add_row(mark, escape(form.name), *_cells(form, s.forms[0]), "yes" if meets(form, s.budget) else "no")
    return table


def listed(s: Situation, chosen: Sequence[Form]) -> list[Form]:
    """The forms worth a row: of those that differ in size alone the recommended one, the first that meets the budget, and the ends."""
    groups: dict[tuple[str, str, str | None], list[Form]] = {}
    for form in s.forms:
        groups.setdefault((form.kind, form.export, form.scheme), []).append(form)
    found = []
    for forms in groups.values():
        first = next((form for form in forms if meets(form, s.budget)), None)
        wanted = [forms[0], first, forms[-1], *[form for form in forms if form in chosen]]
        found += forms if len(forms) <= ROWS else [form for form in forms if form in wanted]
    return found


def _cells(form: Form, whole: Form) -> list[str]:
    faster = "" if form.ms is None or whole.ms is None else f"{whole.ms.value / form.ms.value:.2f}"
    return [
        f"{form.parameters / 1e6:,.3g}M",
        _figure(form.bytes, shown(form.bytes.value, "bytes")),
        f"{form.bytes.value / whole.bytes.value:.0%}",
        "?" if form.ms is None else _figure(form.ms, shown(form.ms.value, "ms").removesuffix(" ms")),
        faster,
        "" if not form.trained else "?" if form.hours is None else _figure(form.hours, shown(form.hours.value, "hours")),
        "?" if form.loss is None else _loss(form.loss),
    ]


def _loss(loss: Loss) -> str:
    size = "0" if loss.value == 0 else "<0.01" if abs(loss.value) < 0.01 else f"{loss.value:.2g}"
    return f"{'' if loss.measured else ESTIMATED}{size} {'pt' if loss.unit == 'points' else 'nat'}"


def _figure(figure: Figure, text: str) -> str:
    return f"{MEASURED if figure.measured else ESTIMATED}{text}"


def steps_text(advice: Advice, commands: Sequence[Sequence[str]]) -> str:
    """The steps in order, with their reasons and commands."""
    lines = []
    for number, (step, typed) in enumerate(zip(advice.steps, commands, strict=True), start=1):
        lines += [f"{number}. {step.what}: {step.form.name}", f"   {step.why}"]
        if step.form.loss is not None:
            mark = "measured" if step.form.loss.measured else "estimated"
            lines.append(f"   quality: {step.form.loss.value:.2g} {step.form.loss.unit} lost, {mark}: {step.form.loss.basis}")
        elif step.form.kind != "keep":
            lines.append("   quality: nobody has measured what this costs; the report at the end of the run says it")
        if step.form.hours is not None:
            lines.append(f"   training: about {shown(step.form.hours.value, 'hours')}, estimated: {step.form.hours.basis}")
        if step.form.note:
            lines.append(f"   {step.form.note}")
        lines += [f"     $ {command}" for command in typed]
    return "\n".join(lines)


def ruled_out_text(advice: Advice) -> str:
    """What was not taken, and why; those that differ in size alone are one line."""
    return "\n".join(f"  {name}: {why}" for name, why in advice.ruled_out.items())


def as_dict(form: Form) -> dict[str, Any]:
    """A form for advice.json."""
    figures = {
        name: None if figure is None else figure.as_dict()
        for name, figure in (("bytes", form.bytes), ("ms", form.ms), ("hours", form.hours))
    }
    loss = None if form.loss is None else {**form.loss._asdict(), "measured": form.loss.measured}
    sizes = (
        None
        if form.sizes is None
        else {name: getattr(form.sizes, name) for name in ("layers", "hidden", "intermediate", "heads", "groups")}
    )
    plain = {name: getattr(form, name) for name in ("name", "kind", "export", "parameters", "tokens", "scheme", "sparsity", "note")}
    return {**plain, **figures, "loss": loss, "sizes": sizes}
