"""What every divergence gets from its base class: softening, T², the schedule."""

import pytest
import torch
from torch import Tensor

from distill.losses.base import Divergence
from distill.losses.support import Distribution
from distill.schedule import Cosine
from distill.types import ConfigError


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
