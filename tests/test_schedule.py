import math

import pytest

from distill.schedule import Constant, Cosine, Linear, Schedule, as_schedule
from distill.types import ConfigError


def test_constant() -> None:
    assert [Constant(3.0)(step, 10) for step in (0, 5, 10, 99)] == [3.0] * 4


@pytest.mark.parametrize(("step", "value"), [(0, 4.0), (25, 3.5), (50, 3.0), (100, 2.0), (1000, 2.0)])
def test_linear(step: int, value: float) -> None:
    assert Linear(4.0, 2.0)(step, 100) == pytest.approx(value)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 4.0), (25, 3 + math.sqrt(0.5)), (50, 3.0), (75, 3 - math.sqrt(0.5)), (100, 2.0), (1000, 2.0)]
)
def test_cosine(step: int, value: float) -> None:
    assert Cosine(4.0, 2.0)(step, 100) == pytest.approx(value)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_fraction_is_where_the_end_is_reached(kind: type[Linear] | type[Cosine]) -> None:
    ramp = kind(1.0, 3.0, fraction=0.5)
    assert ramp(25, 100) == pytest.approx(2.0)
    assert ramp(49, 100) < 3.0
    assert ramp(50, 100) == ramp(100, 100) == 3.0


@pytest.mark.parametrize("total", [0, 1])
def test_a_run_of_hardly_any_steps_divides_by_nothing(total: int) -> None:
    assert Linear(1.0, 2.0, fraction=0.1)(0, total) == 1.0
    assert Linear(1.0, 2.0, fraction=0.1)(1, total) == 2.0


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction must be in \(0, 1\], got"):
        Cosine(1.0, 2.0, fraction)


def test_as_schedule() -> None:
    ramp: Schedule = Linear(1.0, 2.0)
    assert as_schedule(ramp) is ramp
    assert as_schedule(2)(7, 9) == 2.0
