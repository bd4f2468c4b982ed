import pytest
import torch

from distill.balance.base import Measured
from distill.balance.calibration import Calibration
from distill.balance.gradnorm import GradNorm
from distill.types import ConfigError


def measured(norms: dict[str, float], exact: list[float] | None = None) -> Measured:
    gram = None if exact is None else torch.tensor(exact, dtype=torch.float64).square().diag()
    return Measured(dict.fromkeys(["a", "b"], 1.0), norms, gram)


def test_norms_are_multiplied_by_the_last_ratios() -> None:
    it = Calibration(1, 4)
    assert it.correct(measured({"a": 2.0, "b": 3.0})).norms == {"a": 2.0, "b": 3.0}
    assert it.correct(measured({"a": 2.0, "b": 3.0}, [8.0, 3.0])).norms == pytest.approx({"a": 8.0, "b": 3.0})  # 4 and 1
    assert it.correct(measured({"a": 1.0, "b": 5.0})).norms == pytest.approx({"a": 4.0, "b": 5.0})
    # the new ratio is 16: the geometric mean of 4 and 16 is 8
    assert it.correct(measured({"a": 1.0, "b": 5.0}, [16.0, 5.0])).norms == pytest.approx({"a": 8.0, "b": 5.0})


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_an_unusable_norm_leaves_the_ratio(bad: float) -> None:
    it = Calibration(1, 4)
    it.correct(measured({"a": 1.0, "b": 1.0}, [3.0, 2.0]))
    it.correct(measured({"a": bad, "b": 1.0}, [9.0, bad]))
    assert it.ratios == pytest.approx({"a": 3.0, "b": 2.0})


def test_norms_come_with_every_exact_measurement() -> None:
    assert [step for step in range(9) if Calibration(3, 4).due(step)] == [0, 3, 4, 6, 8]
    assert [step for step in range(9) if Calibration(4, 0).due(step)] == [0, 4, 8]


def test_shares_are_those_on_the_parameters() -> None:
    balancer = GradNorm(shares={"a": 3, "b": 1}, smoothing=0.0)
    balancer.start(["a", "b"])
    balancer.update(measured({"a": 1.0, "b": 1.0}, [0.5, 20.0]))
    w = balancer.weights(["a", "b"])
    assert w["a"] * 0.5 == pytest.approx(3 * w["b"] * 20.0)


def test_numbers_of_steps_out_of_range() -> None:
    with pytest.raises(ConfigError, match="want every ≥ 1 and exact_every ≥ 0"):
        Calibration(0, 1)
