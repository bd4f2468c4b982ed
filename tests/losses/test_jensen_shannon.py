import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon  # type: ignore[import-untyped]
from scipy.stats import entropy  # type: ignore[import-untyped]
from torch import Tensor

from distill.losses.divergence import forward_kl, reverse_kl
from distill.losses.jensen_shannon import JensenShannon, jensen_shannon
from distill.losses.support import Distribution
from distill.types import ConfigError

settings_JensenShannon = [{"beta": 0.5}, {"beta": 0.1}, {"beta": 0.9}, {"beta": 0.0}, {"beta": 1.0}]  # noqa: N816


def reference_JensenShannon(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, beta: float = 0.5, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² (β Σ p log(p / m) + (1 − β) Σ q log(q / m)), m = β p + (1 − β) q; forward KL for β = 0 and reverse KL for β = 1."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    m = beta * p + (1 - beta) * q
    to_m = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    ends = {0.0: (p * (p / q).log()).sum(-1), 1.0: (q * (q / p).log()).sum(-1)}
    return ends.get(beta, to_m) * (temperature**2 if t_squared else 1)


def pair(n: int = 6, v: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, v, dtype=torch.float64), torch.randn(n, v, dtype=torch.float64)


def test_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/4, 3/4), β = 1/2: m = (1/2, 1/2), both parts 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert jensen_shannon(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)


def test_which_side_beta_weighs_by_hand() -> None:
    # teacher (1, 0) as good as, student (1/2, 1/2), β = 1/4: m = (1/4 + 3/8, 3/8) = (5/8, 3/8)
    # 1/4 ln(8/5) + 3/4 (1/2 ln(4/5) + 1/2 ln(4/3))
    teacher, student = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.25 * math.log(8 / 5) + 0.375 * math.log(4 / 5) + 0.375 * math.log(4 / 3)
    assert jensen_shannon(student, teacher, 0.25).item() == pytest.approx(expected, abs=1e-7)


def test_the_symmetric_one_against_scipy() -> None:
    student, teacher = pair()
    expected = torch.as_tensor(jensenshannon(teacher.softmax(-1), student.softmax(-1), axis=-1)) ** 2  # scipy gives the root
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(logq, logp), expected)
    torch.testing.assert_close(jensen_shannon(logp, logq), expected)


@pytest.mark.parametrize("beta", [1e-5, 0.3, 0.8, 0.9999])
def test_any_beta_against_scipy(beta: float) -> None:
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * torch.as_tensor(entropy(p, m, axis=-1)) + (1 - beta) * torch.as_tensor(entropy(q, m, axis=-1))
    torch.testing.assert_close(jensen_shannon(q.log(), p.log(), beta), expected)


def test_the_ends_are_forward_and_reverse_kl() -> None:
    student, teacher = (x.log_softmax(-1) for x in pair())
    assert jensen_shannon(student, teacher, 0.0).equal(forward_kl(student, teacher))
    assert jensen_shannon(student, teacher, 1.0).equal(reverse_kl(student, teacher))


def test_the_ends_are_the_limits_of_the_divergence_over_its_smaller_weight() -> None:
    student, teacher = (x.log_softmax(-1) for x in pair())
    small = 1e-6
    torch.testing.assert_close(jensen_shannon(student, teacher, small) / small, forward_kl(student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(jensen_shannon(student, teacher, 1 - small) / small, reverse_kl(student, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_at_most_the_entropy_of_beta(beta: float) -> None:
    apart = jensen_shannon(torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]]), beta).item()
    assert apart == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log(1 - beta), rel=1e-6)
    assert apart <= math.log(2) * (1 + 1e-6)
    student, teacher = (10 * x for x in pair(200))
    assert (jensen_shannon(student.log_softmax(-1), teacher.log_softmax(-1), beta) <= apart * (1 + 1e-6)).all()


@pytest.mark.parametrize("beta", [0.0, 1e-5, 0.3, 0.5, 0.9995, 1.0])
def test_the_gradient_of_both_sides_is_that_of_the_value(beta: float) -> None:
    student, teacher = (x.requires_grad_() for x in pair(3, 7))
    assert torch.autograd.gradcheck(lambda s, t: jensen_shannon(s.log_softmax(-1), t.log_softmax(-1), beta), (student, teacher))
    same = student.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: jensen_shannon(s.log_softmax(-1), same.detach().log_softmax(-1), beta), (same,))


@pytest.mark.parametrize(("beta", "temperature", "noise"), [(0.5, 8.0, 0.04), (0.5, 4.0, 0.004), (0.1, 4.0, 0.004)])
def test_close_distributions_at_high_temperature(beta: float, temperature: float, noise: float) -> None:
    torch.manual_seed(0)
    student = 2 * torch.randn(16, 32000)
    teacher = student + noise * torch.randn(16, 32000)
    value = JensenShannon(beta, temperature)(Distribution(student), Distribution(teacher), None)
    true = reference_JensenShannon(student.double(), teacher.double(), torch.zeros(16), beta, temperature)
    assert (value >= 0).all()
    assert ((value - true) / true).abs().max() <= 1e-2


def test_no_position_and_one_class() -> None:
    assert jensen_shannon(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
    assert jensen_shannon(torch.zeros(3, 1), torch.zeros(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match=rf"beta must be in \[0, 1\], got {beta}"):
        JensenShannon(beta)
