"""Budgets as people write them."""

from typing import Any

import pytest

from distill.advise.budget import parse
from distill.types import ConfigError


@pytest.mark.parametrize(
    ("text", "target", "task", "whole", "limit", "unit"),
    [
        ("500 MB", "size", "causal-lm", None, 5e8, "bytes"),
        ("500MB", "size", "causal-lm", None, 5e8, "bytes"),
        ("1.5 GiB", "size", "causal-lm", None, 1.5 * 2**30, "bytes"),
        ("30 %", "size", "causal-lm", 2e6, 6e5, "bytes"),
        ("100%", "latency", "causal-lm", 12.0, 12.0, "ms"),
        ("20 ms", "latency", "classification", None, 20.0, "ms"),
        ("0.5 s", "latency", "classification", None, 500.0, "ms"),
        ("1 point", "quality", "classification", None, 1.0, "points"),
        ("0 points", "quality", "classification", None, 0.0, "points"),
        ("5e-2 nats", "quality", "causal-lm", None, 0.05, "nats"),
    ],
)
def test_a_budget_is_read(text: str, target: Any, task: str, whole: float | None, limit: float, unit: str) -> None:
    found = parse(text, target, task, whole)
    assert found.limit == pytest.approx(limit, rel=1e-12)
    assert (found.unit, found.text) == (unit, text)


@pytest.mark.parametrize(
    ("text", "target", "task", "said"),
    [
        ("small", "size", "causal-lm", "'small' is no number with a unit; write e.g. \"500 MB\""),
        ("1.2.3 MB", "size", "causal-lm", "no number with a unit"),
        ("500", "size", "causal-lm", "'500' has no unit of size"),
        ("20 ms", "size", "causal-lm", "'20 ms' has no unit of size"),
        ("20 MB", "latency", "causal-lm", "no unit of latency"),
        ("0 MB", "size", "causal-lm", "must be above 0"),
        ("-3 ms", "latency", "causal-lm", "must be above 0"),
        ("-1 point", "quality", "classification", "must be at least 0"),
        ("120 %", "size", "causal-lm", "more than the teacher has"),
        ("1 point", "quality", "causal-lm", "write it in nats"),
        ("1 nat", "quality", "classification", "write it in points"),
        ("5 %", "quality", "classification", "write it in points"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(text: str, target: Any, task: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, target, task, 1.0)
    assert said in str(error.value)
    assert "write" in str(error.value)
