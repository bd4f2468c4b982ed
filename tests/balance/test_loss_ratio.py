import math
from typing import Any

import pytest

from distill.balance.base import Measured
from distill.balance.loss_ratio import LossRatio
from distill.types import ConfigError

settings_LossRatio = [{}, {"shares": {"ce": 1, "kd": 3, "feat": 0}, "smoothing": 0.0}, {"min": 0.5, "max": 1.5}]  # noqa: N816


def started(names: str = "ce kd", **given: Any) -> LossRatio:
    balancer = LossRatio(**given)
    balancer.start(names.split())
    return balancer


def weights(balancer: LossRatio, names: str = "ce kd") -> list[float]:
    return list(balancer.weights(names.split()).values())


def test_by_hand() -> None:
    balancer = started()
    assert weights(balancer) == [1.0, 1.0]
    balancer.update(Measured({"ce": 4.0, "kd": 1.0}))
    assert weights(balancer) == pytest.approx([0.4, 1.6])  # 1/4 : 1; both values weigh 1.6


def test_shares_are_met() -> None:
    shares, losses = {"ce": 0.2, "kd": 0.5, "feat": 0.3}, {"ce": 3.0, "kd": 0.01, "feat": 7.0}
    balancer = started("ce kd feat", shares=shares)
    balancer.update(Measured(losses))
    w = balancer.weights(list(losses))
    value = {name: w[name] * losses[name] for name in losses}
    assert {name: value[name] / sum(value.values()) for name in value} == pytest.approx(shares)
    assert sum(w.values()) == pytest.approx(3)


def test_smoothing_by_hand() -> None:
    balancer = started(smoothing=0.5)
    balancer.update(Measured({"ce": 4.0, "kd": 1.0}))
    balancer.update(Measured({"ce": 2.0, "kd": 2.0}))  # half way from 1 : 4 to 1 : 1 is 1 : 2
    assert weights(balancer) == pytest.approx([2 / 3, 4 / 3])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_an_unusable_loss_leaves_its_weight(bad: float) -> None:
    balancer = started("ce kd feat", smoothing=0.0)
    balancer.update(Measured({"ce": 1.0, "kd": 2.0, "feat": 4.0}))
    balancer.update(Measured({"ce": 3.0, "kd": bad, "feat": 3.0}))
    assert weights(balancer, "ce kd feat") == pytest.approx([15 / 14, 6 / 7, 15 / 14])


def test_needs_no_gradient() -> None:
    balancer = started()
    assert not any(balancer.wants_norms(step) or balancer.wants_gram(step) for step in range(20))


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.balancer\.shares: unknown \['dk'\], missing \['kd'\]"):
        started(shares={"ce": 1, "dk": 1})
    with pytest.raises(ConfigError, match="LossRatio balances at least two terms"):
        started("kd")
