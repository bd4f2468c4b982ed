"""What every divergence gets from its base class: softening, T², the schedule."""

import pytest
import torch
from torch import Tensor

from distill.losses.base import Divergence, Loss, TokenLoss
from distill.losses.class_weighted import ClassWeighted, FrequencyPower
from distill.losses.hard import CrossEntropy
from distill.losses.support import Distribution
from distill.schedule import Constant, Cosine, Linear, Schedule
from distill.types import ConfigError
from tests.losses.dense import setting


class Gap(Divergence):
    """Squared distance of the softened log-probabilities: simple enough to differentiate by hand."""

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return (student_logp_NV - teacher_logp_NV).square().sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_softened_log_probabilities_are_those_of_the_divided_logits(temperature: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 11, dtype=torch.float64)
    expected = torch.log(torch.exp(logits / temperature) / torch.exp(logits / temperature).sum(-1, keepdim=True))
    torch.testing.assert_close(Distribution(logits).logp(temperature), expected)


def test_the_factor_is_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    teacher, labels = Distribution(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)
    results = []
    for t_squared in (True, False):
        student = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        value = Gap(3.0, t_squared)(Distribution(student), teacher, labels)
        value.sum().backward()
        results.append((value.detach(), student.grad))
    for with_factor, without in zip(*results, strict=True):
        torch.testing.assert_close(with_factor, 9 * without)


def test_a_schedule_that_ends_at_no_temperature_is_refused_before_it_gets_there() -> None:
    with pytest.raises(ConfigError, match="temperature must be > 0, got 0"):
        Gap(Cosine(5.0, 0.0, fraction=0.5))


def test_a_schedule_moves_it() -> None:
    loss = Gap(Cosine(5.0, 1.0))
    for step, value in ((0, 5.0), (50, 3.0), (100, 1.0), (200, 1.0)):
        loss.at(step, 100)
        assert loss.scheduled() == {"temperature": pytest.approx(value)}


# ---- targets that cannot be softened after


def test_a_target_of_another_temperature_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.losses\.kd\.temperature is 4, but the teacher's target was made with 2, .* set model\.losses\.kd\.temperature=2,",
    ):
        Gap(4.0).prepare(setting(5, key="model.losses.kd", target_temperature=2.0))
    with pytest.raises(ConfigError, match=r"temperature is 1, but the teacher's target was made with 1\.5,"):
        Gap().prepare(setting(5, target_temperature=1.5))


@pytest.mark.parametrize("temperature", [2.0, Constant(2.0)])
def test_the_same_temperature_is_taken_and_any_where_the_target_can_be_softened(temperature: float | Schedule) -> None:
    loss = Gap(temperature)
    loss.prepare(setting(5, target_temperature=2.0))
    assert loss.T == 2.0
    Gap(7.0).prepare(setting(5, target_temperature=None))


@pytest.mark.parametrize("schedule", [Linear(4.0, 2.0), Linear(2.0, 4.0), Cosine(2.0, 1.0)])
def test_a_schedule_that_leaves_the_targets_temperature_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ConfigError, match="cannot be softened after"):
        Gap(schedule).prepare(setting(5, target_temperature=2.0))


def test_prepare_leaves_the_schedule_at_its_start() -> None:
    loss = Gap(Linear(4.0, 2.0))
    loss.at(1, 1)
    loss.prepare(setting(5))
    assert loss.T == 4.0


def test_a_wrapped_term_is_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="made with 3"):
        ClassWeighted(Gap(2.0), FrequencyPower()).prepare(setting(5, target_temperature=3.0))


def test_a_term_is_right_on_all_classes_alone_unless_it_says_more() -> None:
    assert Gap.supports == TokenLoss.supports == {"classes"}
    assert {"classes", "bins", "draws"} == Loss.supports  # taps do not depend on what is known of the classes
    assert "bins" not in CrossEntropy.supports
