"""What is drawn is where it should be."""

import pytest

from distill.report.costs.tradeoff import Point, draw, on_front
from distill.report.page import plots


def near(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.01}


POINTS = [Point("large", 90.0, near(0.9)), Point("small", 10.0, near(0.8)), Point("bad", 20.0, near(0.5))]


def test_the_front_begins_with_the_cheapest() -> None:
    assert on_front(POINTS) == ["small", "large"]


def test_points_intervals_and_the_line() -> None:
    (axes,) = draw(POINTS, "size, MB", "accuracy", plots.styles(p.name for p in POINTS)).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("size, MB", "accuracy, %")
    assert axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} == {"large", "small", "bad"}
    front, *_ = axes.lines
    assert front.get_xdata().tolist() == [10.0, 90.0]
    assert list(front.get_ydata()) == pytest.approx([80.0, 90.0])
    (bar,) = axes.containers[1][2]  # of `small`
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([78.0, 81.0])


def test_of_many_only_the_front_is_named() -> None:
    many = [Point(str(i), 1.0 + i, near(0.9 - i / 100)) for i in range(12)]
    (axes,) = draw(many, "ms", "accuracy", plots.styles(p.name for p in many)).axes
    assert [text.get_text() for text in axes.texts] == ["0"]
