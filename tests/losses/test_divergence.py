import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import entropy  # type: ignore[import-untyped]
from torch import Tensor

from distill.losses.divergence import ForwardKL, ReverseKL, forward_kl, pinned, reverse_kl
from distill.losses.support import Distribution, log_probs
from distill.schedule import Linear
from distill.types import ConfigError


def reference_ForwardKL(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² Σ_v p_v (log p_v − log q_v), with p = exp(t_v / T) / Σ_u exp(t_u / T) of the teacher and q of the student."""
    s, t = student_logits / temperature, teacher_logits / temperature
    log_q, log_p = s - s.logsumexp(-1, keepdim=True), t - t.logsumexp(-1, keepdim=True)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl * temperature * temperature if t_squared else kl


def reference_ReverseKL(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² Σ_v q_v (log q_v − log p_v), with p of the teacher and q of the student, softened as above."""
    s, t = student_logits / temperature, teacher_logits / temperature
    log_q, log_p = s - s.logsumexp(-1, keepdim=True), t - t.logsumexp(-1, keepdim=True)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return kl * temperature * temperature if t_squared else kl


def test_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)


def test_direction_is_teacher_then_student() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    expected = entropy(teacher.softmax(-1), student.softmax(-1), axis=-1)  # scipy: Σ pk log(pk / qk)
    torch.testing.assert_close(forward_kl(log_probs(student, 9), log_probs(teacher, 9)), torch.as_tensor(expected))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 10.0])
def test_softened_by_t_and_multiplied_by_t_squared(temperature: float) -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = torch.as_tensor(entropy(p, q, axis=-1))
    logp = Distribution(student), Distribution(teacher)
    torch.testing.assert_close(ForwardKL(temperature)(*logp, None), temperature**2 * expected)
    torch.testing.assert_close(ForwardKL(temperature, t_squared=False)(*logp, None), expected)


def test_temperature_follows_its_schedule() -> None:
    loss = ForwardKL(Linear(4.0, 2.0))
    assert loss.scheduled() == {"temperature": 4.0}
    loss.at(5, 10)
    assert loss.scheduled() == {"temperature": 3.0}
    student, teacher = (Distribution(torch.tensor([p]).log()) for p in ([0.2, 0.8], [0.6, 0.4]))
    assert loss(student, teacher, None).item() == pytest.approx(ForwardKL(3.0)(student, teacher, None).item())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature must be > 0, got"):
        ForwardKL(temperature)


def test_a_schedule_that_reaches_zero_is_refused_where_it_does() -> None:
    with pytest.raises(ConfigError, match="temperature must be > 0, got 0"):
        ForwardKL(Linear(1.0, 0.0))


@pytest.mark.parametrize(("temperature", "noise"), [(4.0, 0.04), (8.0, 0.04), (4.0, 0.004)])
def test_close_distributions_at_high_temperature(temperature: float, noise: float) -> None:
    torch.manual_seed(0)
    student = 2 * torch.randn(32, 32000)
    teacher = student + noise * torch.randn(32, 32000)
    value = ForwardKL(temperature)(Distribution(student), Distribution(teacher), None)
    true = reference_ForwardKL(student.double(), teacher.double(), torch.zeros(32), temperature)
    assert (value >= 0).all()
    assert ((value - true) / true).abs().max() <= 1e-2


def test_the_gradient_of_both_sides_is_that_of_the_value() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, t: forward_kl(s.log_softmax(-1), t.log_softmax(-1)), (student, teacher))
    assert torch.autograd.gradcheck(forward_kl, (student.detach().requires_grad_(), teacher.detach().requires_grad_()))


def test_reverse_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 10.0])
def test_reverse_is_student_then_teacher(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    expected = torch.as_tensor(entropy((student / temperature).softmax(-1), (teacher / temperature).softmax(-1), axis=-1))
    ours = ReverseKL(temperature, t_squared=False)(Distribution(student), Distribution(teacher), None)
    torch.testing.assert_close(ours, expected)


def test_reverse_is_accurate_on_close_distributions_at_high_temperature() -> None:
    torch.manual_seed(0)
    student = 2 * torch.randn(32, 32000)
    teacher = student + 0.004 * torch.randn(32, 32000)
    value = ReverseKL(4.0)(Distribution(student), Distribution(teacher), None)
    true = reference_ReverseKL(student.double(), teacher.double(), torch.zeros(32), 4.0)
    assert (value >= 0).all()
    assert ((value - true) / true).abs().max() <= 1e-2


def test_the_gradient_of_both_sides_of_the_reverse_is_that_of_the_value() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, t: reverse_kl(s.log_softmax(-1), t.log_softmax(-1)), (student, teacher))
    assert torch.autograd.gradcheck(reverse_kl, (student.detach().requires_grad_(), teacher.detach().requires_grad_()))
    assert torch.autograd.gradcheck(lambda s: reverse_kl(s, teacher.detach()), (student,))


@pytest.mark.parametrize(("divergence", "other"), [(forward_kl, reverse_kl), (reverse_kl, forward_kl)])
def test_no_position_and_one_class(divergence: Callable[[Tensor, Tensor], Tensor], other: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert divergence(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
    assert divergence(torch.zeros(3, 1), torch.zeros(3, 1)).tolist() == [0, 0, 0]
    student, teacher = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.7, 0.3]]).log()
    torch.testing.assert_close(divergence(student, teacher), other(teacher, student))


def test_a_pinned_gradient_is_the_same_behind_a_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(4, 6, dtype=torch.float64)
    logq = logits.log_softmax(-1)
    changed = pinned(gradient.clone(), logq.exp().detach())
    assert (changed.gather(-1, logq.argmax(-1, keepdim=True)) == 0).all()
    plain, other = (torch.autograd.grad(logq, logits, each, retain_graph=True)[0] for each in (gradient, changed))
    torch.testing.assert_close(other, plain)


def test_a_pinned_gradient_keeps_its_digits_where_the_student_is_sure() -> None:
    logits = torch.tensor([[12.0, 0.5, -1.0, 0.0]])
    slope = torch.tensor([[3.0, 1.0, -2.0, 0.7]])  # the gradient of log q is q · slope

    def on_logits(dtype: torch.dtype, pin: bool) -> Tensor:
        leaf = logits.to(dtype).requires_grad_()
        logq = leaf.log_softmax(-1)
        q = logq.detach().exp()
        gradient = q * slope.to(dtype)
        return torch.autograd.grad(logq, leaf, pinned(gradient, q) if pin else gradient)[0].double()

    true = on_logits(torch.float64, pin=False)
    assert (on_logits(torch.float32, pin=True) - true).norm() <= 1e-6 * true.norm()
    assert (on_logits(torch.float32, pin=False) - true).norm() > 1e-4 * true.norm()
