import math

import pytest
import torch
from torch import Tensor

from distill.losses.adaptive import AdaptiveKL, adaptive_kl, head_of
from distill.losses.divergence import forward_kl, reverse_kl
from distill.types import ConfigError

settings_AdaptiveKL = [{"mu": 0.5}, {"mu": 0.9}, {"mu": 0.05}]  # noqa: N816


def reference_AdaptiveKL(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mu: float = 0.5, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² (g_head KL(p ‖ q) + g_tail KL(q ‖ p)) / (g_head + g_tail), the head found by a full sort, the factors constants."""
    values = []
    for s, t in zip(student_logits / temperature, teacher_logits / temperature, strict=True):
        p, q = t.softmax(-1), s.softmax(-1)
        falling = p.sort(descending=True).values.tolist()
        mass, smallest = 0.0, falling[0]
        for smallest in falling:
            mass += smallest
            if mass >= mu:
                break
        gap = (p - q).detach().abs()
        head, tail = gap[p >= smallest].sum(), gap[p < smallest].sum()
        forward, reverse = (p * (p.log() - q.log())).sum(), (q * (q.log() - p.log())).sum()
        values.append((head * forward + tail * reverse) / (head + tail))
    value = torch.stack(values) if values else student_logits.sum(-1)
    return value * temperature**2 if t_squared else value


def test_by_hand() -> None:
    # teacher (0.6, 0.3, 0.1), student (0.2, 0.3, 0.5): the head is {0}, gaps 0.4 and 0.4, so half of each divergence
    teacher, student = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    forward = 0.6 * math.log(3) + 0.1 * math.log(0.2)
    reverse = 0.2 * math.log(1 / 3) + 0.5 * math.log(5)
    assert adaptive_kl(student, teacher).item() == pytest.approx((forward + reverse) / 2, abs=1e-6)
    # mu = 0.8: the head is {0, 1}, gaps 0.4 + 0 and 0.4, the same; teacher (0.6, 0.3, 0.1), student (0.3, 0.6, 0.1): all gap in the head
    assert adaptive_kl(student, teacher, 0.8).item() == pytest.approx((forward + reverse) / 2, abs=1e-6)
    swapped = torch.tensor([[0.3, 0.6, 0.1]]).log()
    assert adaptive_kl(swapped, teacher, 0.8).item() == pytest.approx(0.3 * math.log(2), abs=1e-6)  # 0.6 ln 2 + 0.3 ln(1/2)


def test_three_quarters_in_the_head_by_hand() -> None:
    # teacher (0.4, 0.35, 0.25), student (0.1, 0.65 − 0.2, 0.45): head {0, 1} of mass 0.75 at mu = 0.5, gaps 0.3 + 0.1 and 0.2
    teacher, student = torch.tensor([[0.4, 0.35, 0.25]]), torch.tensor([[0.1, 0.45, 0.45]])
    forward, reverse = forward_kl(student.log(), teacher.log()), reverse_kl(student.log(), teacher.log())
    torch.testing.assert_close(adaptive_kl(student.log(), teacher.log()), (2 * forward + reverse) / 3)


def test_the_class_that_reaches_mu_is_in_the_head() -> None:
    p = torch.tensor([[0.3, 0.1, 0.4, 0.2]]).log()
    assert head_of(p, 0.35).tolist() == [[False, False, True, False]]
    assert head_of(p, 0.5).tolist() == [[True, False, True, False]]
    assert head_of(p, 0.95).tolist() == [[True, True, True, True]]


def test_equally_likely_classes_stay_together() -> None:
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    assert head_of(p, 0.5).tolist() == [[True, True, True, True]]
    assert head_of(p, 0.3).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("mu", [0.01, 0.5, 0.999])
def test_a_head_of_any_size_is_that_of_a_full_sort(spread: float, mu: float) -> None:
    torch.manual_seed(0)
    logp = (spread * torch.randn(4, 5000, dtype=torch.float64)).log_softmax(-1)
    for row, head in zip(logp, head_of(logp, mu), strict=True):
        falling = row.sort(descending=True).values
        smallest = falling[int((falling.exp().cumsum(0) < mu).sum())]
        assert head.equal(row >= smallest)


def test_no_gradient_through_the_share() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(1, 5, dtype=torch.float64, requires_grad=True), torch.randn(1, 5, dtype=torch.float64).log_softmax(-1)

    def gradient(value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        return found

    student = logits.log_softmax(-1)
    value, forward, reverse = adaptive_kl(student, teacher), forward_kl(student, teacher), reverse_kl(student, teacher)
    w = ((value - reverse) / (forward - reverse)).detach()
    torch.testing.assert_close(gradient(value), w * gradient(forward) + (1 - w) * gradient(reverse))


def test_no_position_and_one_class() -> None:
    assert adaptive_kl(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
    assert adaptive_kl(torch.zeros(3, 1), torch.zeros(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("mu", [0.0, 1.0, -1.0, math.nan])
def test_a_mu_out_of_range_is_refused(mu: float) -> None:
    with pytest.raises(ConfigError, match=rf"mu must be in \(0, 1\), got {mu}"):
        AdaptiveKL(mu)
