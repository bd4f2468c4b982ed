"""What stands on the terminal: marks of what is measured and estimated, 110 columns, nothing cut off."""

import io

from rich.console import Console

from distill.advise import show
from distill.advise.decide import decide
from distill.advise.parts import Figure, Loss
from tests.advise.situations import FORMS, form, situation


def printed(limit: float) -> str:
    s = situation("size", limit)
    console = Console(width=110, file=io.StringIO())
    console.print(show.forms_table(s, decide(s)))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_advised_rows_are_marked_and_estimates_too() -> None:
    lines = printed(9).splitlines()
    assert {line.split()[1] for line in lines if "▸" in line} == {"int4", "student"}
    whole = next(line for line in lines if line.strip().startswith("whole"))
    assert "~100 MB" in whole
    assert whole.rstrip().endswith("no")
    assert next(line for line in lines if "student 2" in line).rstrip().endswith("yes")
    assert "…" not in printed(9)


def test_measured_figures_have_no_mark() -> None:
    assert show._figure(Figure(1.0, True, ""), "1 MB") == "1 MB"
    assert show._figure(Figure(1.0, False, ""), "1 MB") == "~1 MB"
    assert show._loss(Loss(0.004, "nats", True, "")) == "<0.01 nat"
    assert show._loss(Loss(1.234, "points", False, "")) == "~1.2 pt"
    assert show._loss(Loss(0.0, "points", True, "")) == "0 pt"


def test_of_forms_that_differ_in_size_alone_a_few_are_shown() -> None:
    many = (FORMS[0], *(form(f"s{i}", "distil", 50 - i, 1, export="onnx:int8", hours=1) for i in range(10)))
    s = situation("size", 45.5, forms=many)
    assert [f.name for f in show.listed(s, [many[8]])] == ["whole", "s0", "s5", "s7", "s9"]


def test_steps_say_quality_time_and_notes() -> None:
    advice = decide(situation("size", 15))
    text = show.steps_text(advice, [["python a"], ["python b"]])
    assert "1. Export without training: int4" in text
    assert "quality: 0.2 nats lost, estimated: made up" in text
    assert "training: about 2 h, estimated: made up" in text
    assert "     $ python b" in text
    unknown = show.steps_text(decide(situation("size", 6)), [[], []])
    assert "nobody has measured what this costs" in unknown


def test_a_form_is_strict_json() -> None:
    found = show.as_dict(FORMS[4])
    assert found["hours"] == {"value": 2, "how": "estimated", "basis": "made up"}
    assert found["loss"] == {"value": 0.05, "unit": "nats", "measured": False, "basis": "made up"}
    assert found["sizes"] is None
