import math

import pytest
import torch

from distill.balance.base import Measured
from distill.balance.uncertainty import Uncertainty
from distill.types import ConfigError

settings_Uncertainty = [{}, {"lr": 1.9}]  # noqa: N816


def test_by_hand() -> None:
    balancer = Uncertainty(lr=0.1)
    assert balancer.weights(["ce", "kd"]) == {"ce": 0.5, "kd": 0.5}
    balancer.update(Measured({"ce": 3.0, "kd": 1.0}))  # s = 0.1 (3 − 1) / 2 = 0.1, and 0
    assert balancer.weights(["ce", "kd"]) == pytest.approx({"ce": 0.5 * math.exp(-0.1), "kd": 0.5})


def test_descends_on_the_papers_objective() -> None:
    rng = torch.Generator().manual_seed(0)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    balancer = Uncertainty(lr=0.05)
    for _ in range(50):
        losses = 5 * torch.rand(3, generator=rng, dtype=torch.float64)
        sigma = (s / 2).exp()
        (gradient,) = torch.autograd.grad((losses / (2 * sigma**2) + sigma.log()).sum(), s)
        s = (s - 0.05 * gradient).detach().requires_grad_()
        balancer.update(Measured(dict(zip("abc", losses.tolist(), strict=True))))
    assert balancer.weights(["a", "b", "c"]) == pytest.approx(dict(zip("abc", (0.5 * (-s).exp()).tolist(), strict=True)))


def test_ends_where_every_term_is_worth_a_half() -> None:
    balancer, losses = Uncertainty(lr=0.5), {"ce": 3.0, "kd": 0.02, "feat": 40.0}
    for _ in range(200):
        balancer.update(Measured(losses))
    assert balancer.weights(list(losses)) == pytest.approx({name: 1 / (2 * loss) for name, loss in losses.items()})


@pytest.mark.parametrize("loss", [0.0, -1.0, -1e300])
def test_a_loss_without_a_fixed_point_stays_bounded(loss: float) -> None:
    balancer = Uncertainty(lr=1.0)
    for _ in range(100):
        balancer.update(Measured({"kd": loss}))
    assert balancer.weights(["kd"])["kd"] == pytest.approx(0.5 * math.exp(10))
    for _ in range(100):
        balancer.update(Measured({"kd": 2.0}))
    assert balancer.weights(["kd"])["kd"] == pytest.approx(0.25)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_its_weight(loss: float) -> None:
    balancer = Uncertainty(lr=0.1)
    balancer.update(Measured({"ce": 3.0, "kd": 3.0}))
    balancer.update(Measured({"ce": loss, "kd": 1.0}))
    assert balancer.weights(["ce"])["ce"] == pytest.approx(0.5 * math.exp(-0.1))


@pytest.mark.parametrize("lr", [0.0, -1.0, 2.0, math.nan])
def test_a_learning_rate_out_of_range_is_refused(lr: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.balancer\.lr must be in \(0, 2\)"):
        Uncertainty(lr)


def test_one_term_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Uncertainty balances at least two terms.*FixedWeights"):
        Uncertainty().start(["kd"])
