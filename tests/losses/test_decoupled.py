import math

import pytest
import torch
from torch import Tensor

from distill.losses.decoupled import DecoupledKD, decoupled_kd
from distill.losses.divergence import forward_kl
from distill.losses.support import Distribution
from distill.types import ConfigError

# not β = 0: TCKD alone is of two numbers, by chance as close to 0 as one likes, where float32 has no five digits left of it
settings_DecoupledKD = [{"alpha": 1.0, "beta": 8.0}, {"alpha": 3.0, "beta": 1.0}, {"alpha": 0.0, "beta": 1.0}]  # noqa: N816


def reference_DecoupledKD(  # noqa: N802
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """T² (α KL(b_p ‖ b_q) + β KL(p̂ ‖ q̂)), the label cut out of every row by hand."""
    values = []
    for s, t, y in zip(student_logits / temperature, teacher_logits / temperature, labels.tolist(), strict=True):
        p, q, others = t.softmax(-1), s.softmax(-1), [v for v in range(len(s)) if v != y]
        rest_p, rest_q = p[others].sum(), q[others].sum()
        tckd = p[y] * (p[y] / q[y]).log() + rest_p * (rest_p / rest_q).log()
        p_hat, q_hat = p[others] / rest_p, q[others] / rest_q
        values.append(alpha * tckd + beta * (p_hat * (p_hat / q_hat).log()).sum())
    value = torch.stack(values) if values else student_logits.sum(-1)
    return value * temperature**2 if t_squared else value


TEACHER = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
STUDENT = torch.tensor([[0.4, 0.2, 0.4]], dtype=torch.float64)


def test_by_hand() -> None:
    # label 1. Teacher (0.3 | 0.7) with the others (5/7, 2/7), student (0.2 | 0.8) with (1/2, 1/2)
    tckd = 0.3 * math.log(3 / 2) + 0.7 * math.log(7 / 8)
    nckd = 5 / 7 * math.log(10 / 7) + 2 / 7 * math.log(4 / 7)
    label = torch.tensor([1])
    assert decoupled_kd(STUDENT.log(), TEACHER.log(), label, 1.0, 0.0).item() == pytest.approx(tckd)
    assert decoupled_kd(STUDENT.log(), TEACHER.log(), label, 0.0, 1.0).item() == pytest.approx(nckd)
    assert decoupled_kd(STUDENT.log(), TEACHER.log(), label, 3.0, 5.0).item() == pytest.approx(3 * tckd + 5 * nckd)


def test_plain_distillation_is_its_parts() -> None:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(50, 7, dtype=torch.float64) for _ in range(2))
    student, teacher, labels = student.log_softmax(-1), teacher.log_softmax(-1), torch.randint(7, (50,))
    target, others = (decoupled_kd(student, teacher, labels, *weights) for weights in ((1.0, 0.0), (0.0, 1.0)))
    p_y = teacher.gather(-1, labels[:, None])[:, 0].exp()
    torch.testing.assert_close(target + (1 - p_y) * others, forward_kl(student, teacher))


def test_two_classes_have_no_others() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 2, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    labels = torch.tensor([0, 1, 0, 1, 1])
    torch.testing.assert_close(decoupled_kd(student, teacher, labels, 1.0, 8.0), forward_kl(student, teacher))
    assert decoupled_kd(student, teacher, labels, 0.0, 1.0).abs().max() == 0


def test_one_class_and_no_position() -> None:
    student = torch.zeros(3, 1, requires_grad=True)
    value = decoupled_kd(student.log_softmax(-1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert student.grad is not None
    assert (student.grad == 0).all()
    assert decoupled_kd(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_a_teacher_too_sure_for_float32_still_teaches_its_others() -> None:
    # 1 − p_y is e^−40, which float32 cannot tell from 0 as 1 − p; the others are (3/4, 1/4) against (1/2, 1/2)
    teacher = torch.tensor([[40.0, math.log(0.75), math.log(0.25)]])
    student = torch.tensor([[60.0, 0.0, 0.0]])
    value = DecoupledKD(0.0, 1.0)(Distribution(student), Distribution(teacher), torch.tensor([0]))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-4)


def test_gradient() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 1, 4, 2])
    assert torch.autograd.gradcheck(lambda s, t: decoupled_kd(s.log_softmax(-1), t.log_softmax(-1), labels), (student, teacher))


@pytest.mark.parametrize(("alpha", "beta"), [(-1.0, 1.0), (1.0, -1.0), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_weights_out_of_range_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(ConfigError, match=f"alpha and beta must be ≥ 0 and not both 0, got {alpha} and {beta}"):
        DecoupledKD(alpha, beta)
