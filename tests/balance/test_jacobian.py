import math
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from distill.balance.base import Measured
from distill.balance.jacobian import JacobianAggregator
from distill.types import ConfigError

settings_JacobianAggregator = [{"weighting": name, "every": 5} for name in ("UPGrad", "DualProj", "MGDA")] + [{}]  # noqa: N816


def needs_JacobianAggregator(weighting: str = "UPGrad", every: int = 1) -> list[str]:  # noqa: N802
    return ["torchjd"] if weighting == "MGDA" else ["torchjd", "quadprog"]


Weighting = Literal["UPGrad", "DualProj", "MGDA"]
every_weighting = pytest.mark.parametrize("weighting", ["UPGrad", "DualProj", "MGDA"])
NAMES = ["ce", "kd", "feat"]


@pytest.fixture
def aggregator(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Make torchjd's own aggregator, of the Jacobian itself."""
    weighting = getattr(request.node, "callspec", None) and request.node.callspec.params.get("weighting")
    for package in needs_JacobianAggregator(weighting or "UPGrad"):
        pytest.importorskip(package, reason=f"{package} is not installed, and is optional")
    aggregation = import_module("torchjd.aggregation")
    return lambda name: getattr(aggregation, name)()


def weights(weighting: Weighting, *jacobians: Tensor) -> Tensor:
    balancer = JacobianAggregator(weighting)
    balancer.start(NAMES)
    for J in jacobians:
        balancer.update(Measured(dict.fromkeys(NAMES, 1.0), gram=J @ J.T))
    return torch.tensor(list(balancer.weights(NAMES).values()), dtype=torch.float64)


def jacobian(seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, generator=rng, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [0.5]])


@every_weighting
def test_combines_the_gradients_as_torchjd_does(aggregator: Callable[[str], Any], weighting: Weighting) -> None:
    plain = 0
    for seed in range(10):
        J = jacobian(seed)
        w = weights(weighting, J)
        torch.testing.assert_close(w @ J, aggregator(weighting)(J), rtol=1e-9, atol=1e-9)
        plain += torch.allclose(w, torch.full_like(w, 1 / 3), atol=1e-6)
    assert plain < 10, "no gradients conflicted, so nothing was compared"


def test_no_term_gets_worse(aggregator: Callable[[str], Any]) -> None:
    J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
    assert (J @ J.mean(0) < 0).any(), "the mean must conflict with a term"
    assert (J @ (weights("UPGrad", J) @ J) > -1e-3).all()


@every_weighting
def test_small_gradients_are_not_taken_for_none(aggregator: Callable[[str], Any], weighting: Weighting) -> None:
    J = jacobian(0)
    torch.testing.assert_close(weights(weighting, 1e-5 * J), weights(weighting, J))


@every_weighting
def test_the_mean_until_it_is_measured(aggregator: Callable[[str], Any], weighting: Weighting) -> None:
    assert weights(weighting).tolist() == pytest.approx([1 / 3] * 3)


@every_weighting
def test_the_weights_stand_between_measurements(aggregator: Callable[[str], Any], weighting: Weighting) -> None:
    balancer = JacobianAggregator(weighting, every=4)
    assert [step for step in range(9) if balancer.wants_gram(step)] == [0, 4, 8]
    assert not any(balancer.wants_norms(step) for step in range(9))
    balancer.start(NAMES)
    J = jacobian(1)
    balancer.update(Measured({}, gram=J @ J.T))
    before = balancer.weights(NAMES)
    balancer.update(Measured({"ce": 1.0, "kd": 5.0, "feat": 9.0}))
    assert balancer.weights(NAMES) == before


@every_weighting
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_an_unusable_gradient_keeps_its_weight(aggregator: Callable[[str], Any], weighting: Weighting, bad: float) -> None:
    first, second = jacobian(0), jacobian(1)
    broken = second.clone()
    broken[1] *= bad
    w = weights(weighting, first, broken)
    assert w[1] == weights(weighting, first)[1]
    others = second[[0, 2]]
    torch.testing.assert_close(w[[0, 2]] @ others, aggregator(weighting)(others) * 2 / 3)


@pytest.mark.parametrize("weighting", ["MGDA"])
def test_rounding_gives_no_negative_weight(aggregator: Callable[[str], Any], weighting: Weighting) -> None:
    balancer = JacobianAggregator(weighting)
    balancer.start(NAMES)
    balancer.weighting = lambda gram: torch.tensor([-1e-17, 0.4, 0.6], dtype=torch.float64)
    balancer.update(Measured({}, gram=torch.eye(3, dtype=torch.float64)))
    assert balancer.weights(NAMES) == {"ce": 0.0, "kd": 0.4, "feat": 0.6}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.balancer\.weighting must be UPGrad, DualProj or MGDA, got 'PCGrad'"):
        JacobianAggregator("PCGrad")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.balancer\.every must be at least 1, got 0"):
        JacobianAggregator(every=0)


@pytest.mark.parametrize("weighting", ["MGDA"])
def test_one_term_is_refused(aggregator: Callable[[str], Any], weighting: Weighting) -> None:
    with pytest.raises(ConfigError, match=r"JacobianAggregator balances at least two terms.*FixedWeights"):
        JacobianAggregator(weighting).start(["kd"])


def test_without_torchjd_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ConfigError, match=r'needs torchjd; pip install "torchjd\[quadprog_projector\]"'):
        JacobianAggregator()


def test_without_the_solver_the_fix_is_named(aggregator: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quadprog", None)
    with pytest.raises(ConfigError, match=r'pip install "torchjd\[quadprog_projector\]".*quadprog'):
        JacobianAggregator()
