"""The decision tree, by table: every leaf, the boundaries, that it is monotone, and what it says where nothing will do."""

from typing import Any

import pytest

from distill.advise.decide import decide, meets, shown, value
from distill.advise.parts import Advice, Form
from tests.advise.situations import FORMS, MB, form, situation


def chosen(advice: Advice) -> str:
    """The form that the advice is about: the first untrained, or the trained one."""
    return (advice.steps[0] if advice.leaf in ("keep", "ptq") else advice.steps[-1]).form.name


@pytest.mark.parametrize(
    ("target", "limit", "hours", "leaf", "name"),
    [
        ("size", 100, None, "keep", "whole"),
        ("size", 99.9, None, "ptq", "bf16"),
        ("size", 50, None, "ptq", "bf16"),
        ("size", 49.9, None, "ptq", "int8"),
        ("size", 15, None, "ptq", "int4"),
        ("size", 14.9, None, "qat", "QAT ternary"),
        ("size", 11.9, None, "distil", "student 3"),
        ("size", 10.9, None, "distil", "student 2"),
        ("size", 8.9, None, "combine", "tiny 2"),
        ("size", 5.9, None, "combine", "tiny 1"),
        ("size", 2.9, None, "impossible", "tiny 1"),
        ("size", 11.9, 6, "distil", "student 2"),  # the larger one takes too long
        ("size", 11.9, 5.9, "combine", "tiny 2"),
        ("size", 11.9, 0.9, "too short", "tiny 1"),
        ("latency", 10, None, "keep", "whole"),
        ("latency", 9.99, None, "ptq", "int8"),  # not int4, which is 1.01 × as fast
        ("latency", 4, None, "ptq", "int8"),
        ("latency", 3.9, None, "prune", "pruned"),
        ("latency", 2.9, None, "distil", "student 3"),
        ("latency", 1.9, None, "combine", "tiny 2"),
        ("latency", 0.9, None, "impossible", "tiny 1"),
        ("latency", 3.9, 2.9, "combine", "tiny 1"),
        ("quality", 0.0, None, "ptq", "bf16"),
        ("quality", 0.05, None, "qat", "QAT int4"),
        ("quality", 0.05, 1, "ptq", "bf16"),
        ("quality", 0.1, 1, "ptq", "int8"),
        ("quality", 0.4, None, "qat", "QAT ternary"),
    ],
)
def test_every_leaf_at_its_boundary(target: Any, limit: float, hours: float | None, leaf: str, name: str) -> None:
    advice = decide(situation(target, limit, hours))
    assert (advice.leaf, chosen(advice)) == (leaf, name)
    assert name in advice.headline or advice.leaf == "keep"
    assert shown(limit * (MB if target == "size" else 1), {"size": "bytes", "latency": "ms", "quality": "nats"}[target]) in (
        advice.headline + advice.steps[-1].why + advice.steps[0].why
    )


@pytest.mark.parametrize("target", ["size", "latency", "quality"])
@pytest.mark.parametrize("hours", [None, 0.5, 2, 5, 100])
def test_a_smaller_budget_never_leads_to_a_larger_or_slower_model(target: Any, hours: float | None) -> None:
    before = 0.0 if target == "quality" else float("inf")
    for limit in [120 * 0.96**i for i in range(120)]:
        s = situation(target, limit / (1 if target == "size" else 10), hours)
        advice = decide(s)
        if advice.leaf in ("too short", "impossible"):
            break
        found = next(f for f in FORMS if f.name == chosen(advice))
        assert meets(found, s.budget)
        now = value(found, s.budget)
        assert now is not None
        if target == "quality":  # less may be lost: never a smaller model
            assert found.bytes.value >= before
            before = found.bytes.value
        else:
            assert now <= before
            before = now


def test_training_comes_with_what_can_be_had_today_before_it() -> None:
    advice = decide(situation("size", 9))
    assert [(step.form.name, step.form.kind) for step in advice.steps] == [("int4", "ptq"), ("student 2", "distil")]
    assert "15 MB, and 9 MB are allowed" in advice.steps[0].why
    assert advice.ruled_out["int8"] == "26 MB, and 9 MB are allowed"
    assert "6 h" in advice.headline


def test_four_bits_are_healed_only_where_there_is_time() -> None:
    assert [step.form.name for step in decide(situation("size", 15, 2)).steps] == ["int4", "QAT int4"]
    assert [step.form.name for step in decide(situation("size", 15, 1.9)).steps] == ["int4"]
    assert [step.form.name for step in decide(situation("size", 26)).steps] == ["int8"]
    other_first = (*FORMS[:4], FORMS[5], FORMS[4])
    assert [step.form.name for step in decide(situation("size", 15, forms=other_first)).steps] == ["int4", "QAT int4"]


def test_too_short_says_how_long_it_takes_and_what_there_is_time_for() -> None:
    advice = decide(situation("size", 4, 0.5))
    assert advice.leaf == "too short"
    assert [step.form.name for step in advice.steps] == ["int4", "tiny 1"]
    assert "takes about 1 h of training, and there are 30 min" in advice.headline


def test_too_long_is_why_a_form_was_passed_over() -> None:
    advice = decide(situation("size", 11.9, 5.9))
    assert advice.ruled_out["student 2, the nearest of 2 sizes"] == "takes about 6 h of training, and there are 5.9 h"


def test_what_gains_nothing_here_is_never_advised_for_speed() -> None:
    forms = (FORMS[0], form("int4", "ptq", 15, 10.0 / 1.04, export="onnx:int4"), form("slow", "prune", 1, 9.8, hours=1))
    advice = decide(situation("latency", 9.9, forms=forms))
    assert advice.leaf == "impossible"
    assert advice.ruled_out["int4"] == "1.04 × the speed here: it gains nothing on this machine"
    assert advice.steps[0].form.name == "whole"
    just = (FORMS[0], form("int4", "ptq", 15, 10.0 / 1.06, export="onnx:int4"))
    assert decide(situation("latency", 9.9, forms=just)).leaf == "ptq"


def test_a_form_without_a_figure_is_never_advised_and_says_so() -> None:
    unknown: tuple[Form, ...] = (form("whole", "keep", 100, 10), form("int8", "ptq", 26, None, export="onnx:int8"))
    advice = decide(situation("quality", 1.0, forms=unknown))
    assert (advice.leaf, advice.steps) == ("impossible", ())
    assert "--data" in advice.headline
    assert decide(situation("latency", 5, forms=unknown)).leaf == "impossible"


def test_what_could_not_be_looked_at_is_said() -> None:
    s = situation("size", 100)
    s.missing["openvino:int8"] = "the package is not installed"
    assert decide(s).ruled_out["openvino:int8"] == "the package is not installed"


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (5.4e8, "bytes", "540 MB"),
        (2.5e9, "bytes", "2.5 GB"),
        (12, "bytes", "12 B"),
        (1.234, "ms", "1.23 ms"),
        (2610, "ms", "2,610 ms"),
        (0.004, "hours", "14 s"),
        (1 / 60, "hours", "1 min"),
        (48, "hours", "2 days"),
    ],
)
def test_quantities_for_people(number: float, unit: str, text: str) -> None:
    assert shown(number, unit) == text
