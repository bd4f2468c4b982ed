"""The tables people read."""

from rich.console import Console
from rich.table import Table

from distill.report.tables import banner, results

TEACHER = {"count": 1000.0, "loss": 4.0, "perplexity": 54.598, "accuracy": 0.25, "kl": 0.0, "agreement": 1.0, "retention": 1.0}
STUDENT = {"count": 1000.0, "loss": 4.5, "perplexity": 90.017, "accuracy": 0.2, "kl": 0.5, "agreement": 0.5, "retention": 0.8}
SIZE = {"parameters": 229_696, "megabytes": 0.92}


def text(table: Table, width: int = 110) -> str:
    console = Console(width=width, record=True, file=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_results_show_every_figure_uncut() -> None:
    shown = text(results({"teacher": TEACHER | SIZE, "student distilled": STUDENT | SIZE | {"seconds": 61.2}}, "token"))
    for part in ("1,000 tokens", "4.5000", "90.0", "20.0%", "0.5000", "50.0%", "80.0%", "230k", "0.9", "61"):
        assert part in shown
    assert "…" not in shown


def test_a_figure_that_no_model_has_gets_no_column() -> None:
    plain = {
        name: {k: v for k, v in STUDENT.items() if k not in ("kl", "agreement", "retention")}
        for name in ("student before", "student after")
    }
    shown = text(results(plain, "sample"))
    assert "KL" not in shown
    assert "ppl" not in shown, "perplexity is of language models only"
    assert "loss" in shown


def test_banner_lists_what_and_how_much() -> None:
    shown = text(banner("Run x", {"student": "new llama", "steps": "300"}))
    assert "Run x" in shown
    assert "new llama" in shown
