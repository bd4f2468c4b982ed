"""Hours: the operations of a step by hand, and a rate that is of this machine."""

from pathlib import Path

import pytest

from distill.advise import training
from distill.advise.parts import Figure
from distill.plan.models import shape_of
from tests.advise.teachers import teacher


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_rate_is_operations_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    t = teacher(tmp_path, kind)
    steps: list[int] = []
    monkeypatch.setattr(training, "seconds_of", lambda step, device: (step(), steps.append(1), 0.5)[-1])
    found = training.rate(t.task, t.config, 16, "cpu")
    assert steps == [1]  # it ran, forward and backward
    inner = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 2 * 64) + 64 + 96 * 64
    attention = 4 * 2 * 64 * 16 / 2
    if kind == "llama":  # forward, twice that backward, and the teacher's forward
        assert found.value == pytest.approx(4 * (2 * inner + attention) * 2 * 16 / 0.5, rel=1e-9)
    assert found.measured
    assert "2 × 16 tokens in 0.5 s" in found.basis


def test_hours_grow_with_tokens_and_fall_with_the_rate(tmp_path: Path) -> None:
    t = teacher(tmp_path)
    shape = shape_of(t.model, "t")
    one = training.hours(t.task, shape, shape, 10**6, 32, Figure(1e9, True, "x"))
    assert training.hours(t.task, shape, shape, 3 * 10**6, 32, Figure(1e9, True, "x")).value == pytest.approx(3 * one.value)
    assert training.hours(t.task, shape, shape, 10**6, 32, Figure(4e9, True, "x")).value == pytest.approx(one.value / 4)
    flops = 4 * (2 * t.weights.parameters + 4 * 4 * 64 * 32 / 2)  # a token: both forward, the student twice that backward
    assert one.value == pytest.approx(10**6 * flops / 1e9 / 3600)
    assert not one.measured


def test_gpus_elsewhere_are_promised() -> None:
    assert training.promised(989.0, 8) == (989e12 * 8 * 0.35, False, "8 × 989 TFLOP/s × 35%")
