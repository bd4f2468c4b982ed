"""The tables a run prints: the banner at its start, the results at its end."""

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(table: Table) -> None:
    """Print a table; where the output is no terminal, 110 columns wide rather than cut at 80."""
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)


def banner(title: str, rows: dict[str, str]) -> Table:
    """Two columns, what and how much."""
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def results(models: dict[str, dict[str, Any]], unit: str) -> Table:
    """One row a model: loss in nats, perplexity `exp(loss)` (of language models only), top-1 accuracy; forward KL to the teacher in nats,
    how often both have the same top-1, the share of the teacher's accuracy that is kept; parameters, megabytes, seconds of training.
    """
    table = Table(title=f"Held-out data, {[*models.values()][-1]['count']:,.0f} {unit}s", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    columns = [c for c in _columns(unit) if any(_present(m.get(c[1])) for m in models.values())]
    for head, *_ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for name, model in models.items():
        table.add_row(name, *(form(model[key]) if _present(model.get(key)) else "" for _, key, form in columns))
    return table


def _count(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _columns(unit: str) -> list[tuple[str, str, Any]]:
    percent = "{:.1%}".format
    return [
        ("loss", "loss", "{:.4f}".format),
        *([("ppl", "perplexity", "{:.1f}".format)] if unit == "token" else []),
        ("accuracy", "accuracy", percent),
        ("KL", "kl", "{:.4f}".format),
        ("agree", "agreement", percent),
        ("retain", "retention", percent),
        ("params", "parameters", _count),
        ("MB", "megabytes", "{:.1f}".format),
        ("seconds", "seconds", "{:.0f}".format),
    ]
