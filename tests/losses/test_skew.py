import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import entropy  # type: ignore[import-untyped]
from torch import Tensor

from distill.losses.divergence import forward_kl, reverse_kl
from distill.losses.skew import SkewKL, SkewReverseKL, log_mixture_share, skew_kl, skew_reverse_kl
from distill.losses.support import Distribution
from distill.types import ConfigError

Skew = Callable[..., Tensor]
settings_SkewKL = settings_SkewReverseKL = [{"alpha": 0.1}, {"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 0.9}]  # noqa: N816


def reference_SkewKL(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float = 0.1, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² Σ_v p_v log(p_v / m_v), m = α p + (1 − α) q."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    kl = (p * (p.log() - (alpha * p + (1 - alpha) * q).log())).sum(-1)
    return kl * temperature**2 if t_squared else kl


def reference_SkewReverseKL(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float = 0.1, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² Σ_v q_v log(q_v / m_v), m = (1 − α) p + α q."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    kl = (q * (q.log() - ((1 - alpha) * p + alpha * q).log())).sum(-1)
    return kl * temperature**2 if t_squared else kl


def pair(n: int = 6, v: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, v, dtype=torch.float64), torch.randn(n, v, dtype=torch.float64)


def test_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/4, 3/4), α = 1/2: both mixtures are (1/2, 1/2), so 3/4 ln(3/2) + 1/4 ln(1/2), both ways
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert skew_kl(student, teacher, 0.5).item() == expected
    assert skew_reverse_kl(student, teacher, 0.5).item() == expected


def test_which_side_the_mixture_leans_to_by_hand() -> None:
    # teacher (1, 0) as good as, student (1/2, 1/2), α = 1/4. SKL: p = 1, m = 1/4 + 3/8 = 5/8, so ln(8/5).
    # SRKL: m = (3/4 + 1/8, 1/8) = (7/8, 1/8), so 1/2 ln(4/7) + 1/2 ln 4 = 1/2 ln(16/7)
    teacher, student = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.5, 0.5]]).log()
    assert skew_kl(student, teacher, 0.25).item() == pytest.approx(math.log(8 / 5), abs=1e-7)
    assert skew_reverse_kl(student, teacher, 0.25).item() == pytest.approx(0.5 * math.log(16 / 7), abs=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 1e-5, 0.1, 0.5, 0.9, 0.9999])
def test_against_scipy(alpha: float) -> None:
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    logq, logp = q.log(), p.log()
    torch.testing.assert_close(skew_kl(logq, logp, alpha), torch.as_tensor(entropy(p, alpha * p + (1 - alpha) * q, axis=-1)))
    torch.testing.assert_close(skew_reverse_kl(logq, logp, alpha), torch.as_tensor(entropy(q, alpha * q + (1 - alpha) * p, axis=-1)))


def test_alpha_zero_is_the_plain_divergence() -> None:
    student, teacher = (x.log_softmax(-1) for x in pair())
    torch.testing.assert_close(skew_kl(student, teacher, 0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, 0.0), reverse_kl(student, teacher))


@pytest.mark.parametrize("skew", [skew_kl, skew_reverse_kl])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_bounded_where_they_share_nothing(skew: Skew, alpha: float) -> None:
    student, teacher = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert skew(student, teacher, alpha).item() == pytest.approx(-math.log(alpha), rel=1e-6)  # −log α, not 10⁴


@pytest.mark.parametrize("skew", [skew_kl, skew_reverse_kl])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.1, 0.5, 0.9995])
def test_the_gradient_of_both_sides_is_that_of_the_value(skew: Skew, alpha: float) -> None:
    student, teacher = (x.requires_grad_() for x in pair(3, 7))
    assert torch.autograd.gradcheck(lambda s, t: skew(s.log_softmax(-1), t.log_softmax(-1), alpha), (student, teacher))
    same = student.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: skew(s.log_softmax(-1), same.detach().log_softmax(-1), alpha), (same,))


@pytest.mark.parametrize("loss", [SkewKL, SkewReverseKL])
@pytest.mark.parametrize(("alpha", "temperature", "noise"), [(0.1, 4.0, 0.004), (0.9, 8.0, 0.04), (1e-4, 4.0, 0.004)])
def test_close_distributions_at_high_temperature(loss: type[SkewKL], alpha: float, temperature: float, noise: float) -> None:
    torch.manual_seed(0)
    student = 2 * torch.randn(16, 32000)
    teacher = student + noise * torch.randn(16, 32000)
    value = loss(alpha, temperature)(Distribution(student), Distribution(teacher), None)
    reference = reference_SkewKL if loss is SkewKL else reference_SkewReverseKL
    true = reference(student.double(), teacher.double(), torch.zeros(16), alpha, temperature)
    assert (value >= 0).all()
    assert ((value - true) / true).abs().max() <= 1e-2


@pytest.mark.parametrize("weight", [0.0, 1e-8, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-4])
def test_the_mixture_is_exact_from_close_to_far(weight: float) -> None:
    size = 10.0 ** torch.arange(-6, 2)
    log_ratio = torch.cat([-size, size])
    for each, ours in zip(log_ratio.tolist(), log_mixture_share(log_ratio, weight).tolist(), strict=True):
        small, large = (1 - weight, weight) if each < 0 else (weight, 1 - weight)
        expected = math.log1p(small * math.expm1(-abs(each))) if abs(each) < 1 else math.log(large + small * math.exp(-abs(each)))
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("weight", [1e-8, 0.1, 0.9])
def test_the_mixture_of_two_that_share_nothing(weight: float) -> None:
    found = log_mixture_share(torch.tensor([-2e4, 2e4]), weight)
    torch.testing.assert_close(found, torch.tensor([math.log(weight), math.log1p(-weight)]))


@pytest.mark.parametrize("skew", [skew_kl, skew_reverse_kl])
def test_no_position_and_one_class(skew: Skew) -> None:
    assert skew(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
    assert skew(torch.zeros(3, 1), torch.zeros(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("loss", [SkewKL, SkewReverseKL])
@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_an_alpha_out_of_range_is_refused(loss: type[SkewKL], alpha: float) -> None:
    with pytest.raises(ConfigError, match=rf"alpha must be in \[0, 1\), got {alpha}"):
        loss(alpha)
