import math
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from distill.optim import AdamW
from distill.types import ConfigError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def rates(settings: dict[str, Any], total: int) -> list[float]:
    """The learning rate at each step, and the one after the last."""
    built = AdamW(**settings).build(model().named_parameters(), total)
    found = []
    for _ in range(total + 1):
        found.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    return found


def test_only_matrices_decay() -> None:
    net = model()
    optimizer = AdamW(weight_decay=0.1, betas=(0.8, 0.9)).build(net.named_parameters(), 10)["optimizer"]
    decayed, kept = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight), id(net[1].weight)]
    assert [id(p) for p in kept["params"]] == [id(net[1].bias), id(net[2].weight), id(net[2].bias)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == kept["betas"] == (0.8, 0.9)


def test_steps_are_those_of_the_formula() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    torch.manual_seed(0)
    net, lr, decay, (b1, b2) = nn.Linear(3, 2), 0.1, 0.2, (0.8, 0.9)
    built = AdamW(lr=lr, weight_decay=decay, betas=(b1, b2), warmup=0, schedule="constant").build(net.named_parameters(), 5)
    w, m, v = net.weight.detach().double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for t in range(1, 6):
        net.weight.grad = torch.randn(2, 3)
        built["optimizer"].step()
        g = net.weight.grad.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8) + decay * w)
        torch.testing.assert_close(net.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_one_pass_over_the_memory_of_a_cpu_only() -> None:
    assert AdamW().build(model().named_parameters(), 10)["optimizer"].defaults["fused"]
    assert not AdamW().build(model().to("meta").named_parameters(), 10)["optimizer"].defaults["fused"]


def test_gradients_are_clipped_under_autocast() -> None:
    """Lightning refuses that for optimizers which unscale in their step, as fused ones say of themselves."""
    optimizer = AdamW().build(model().named_parameters(), 10)["optimizer"]
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.full_like(param, 9)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.clip_gradients(optimizer, 1.0)
    assert param.grad.norm() == pytest.approx(1, rel=1e-4)


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    optimizer = AdamW().build(net.named_parameters(), 10)["optimizer"]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net[1].parameters()}


def test_no_empty_group() -> None:
    assert len(AdamW().build(nn.LayerNorm(3).named_parameters(), 10)["optimizer"].param_groups) == 1


def test_the_schedule_moves_every_step() -> None:
    assert AdamW().build(model().named_parameters(), 10)["lr_scheduler"]["interval"] == "step"


def test_cosine_by_hand() -> None:
    found = rates({"lr": 1.0, "warmup": 4, "schedule": "cosine", "min_lr_ratio": 0.1}, 24)
    assert found[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found[9] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[14] == pytest.approx(0.55)
    assert found[24] == pytest.approx(0.1)


def test_warmup_as_a_share() -> None:
    found = rates({"lr": 2.0, "warmup": 0.25, "schedule": "constant"}, 8)
    assert found == pytest.approx([0.0, 1.0, *[2.0] * 7])


def test_linear_by_hand() -> None:
    found = rates({"lr": 1.0, "warmup": 2, "schedule": "linear", "min_lr_ratio": 0.0}, 12)
    assert found[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert found[7] == pytest.approx(0.5)
    assert found[12] == pytest.approx(0.0)


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates({"lr": 1.0, "warmup": 0}, 10)[0] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -0.1}, {"warmup": -1}, {"min_lr_ratio": 1.1}, {"min_lr_ratio": -0.1}],
)
def test_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"optimizer: {next(iter(wrong))} is out of range, got"):
        AdamW(**wrong)


def test_betas_out_of_range() -> None:
    try:
        AdamW(betas=(0.9, 1.0)).build(model().named_parameters(), 10)
    except ConfigError:
        return
    pytest.fail("nothing was said")


def test_nothing_to_train() -> None:
    try:
        AdamW().build(model().requires_grad_(False).named_parameters(), 10)
    except ConfigError:
        return
    pytest.fail("nothing was said")


def test_linear_ends_at_the_minimum() -> None:
    assert rates({"lr": 1.0, "warmup": 0, "schedule": "linear", "min_lr_ratio": 0.1}, 10)[10] == pytest.approx(0.1)


def test_a_warmup_longer_than_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup"):
        AdamW(warmup=1000).build(model().named_parameters(), 10)
