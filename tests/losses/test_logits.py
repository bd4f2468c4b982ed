import pytest
import torch
from torch import Tensor

from distill.losses.divergence import ForwardKL
from distill.losses.logits import LogitMSE, logit_mse
from distill.losses.support import Distribution


def reference_LogitMSE(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:  # noqa: N802
    """1/V Σ_v ((s_v − s̄) − (t_v − t̄))²."""
    s = student_logits - student_logits.sum(-1, keepdim=True) / student_logits.shape[-1]
    t = teacher_logits - teacher_logits.sum(-1, keepdim=True) / teacher_logits.shape[-1]
    return ((s - t) ** 2).sum(-1) / student_logits.shape[-1]


def test_by_hand() -> None:
    # centred, (1, 2, 3) is (−1, 0, 1) and (3, 0, 0) is (2, −1, −1): differences −3, 1, 2
    assert logit_mse(torch.tensor([[1.0, 2, 3]]), torch.tensor([[3.0, 0, 0]])).item() == pytest.approx((9 + 1 + 4) / 3)


def test_a_constant_per_position_does_not_matter() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = logit_mse(student, teacher)
    torch.testing.assert_close(logit_mse(student + torch.randn(4, 1), teacher - 7), expected)
    torch.testing.assert_close(logit_mse(student.log_softmax(-1), teacher.log_softmax(-1)), expected)
    assert logit_mse(student + 5, student).abs().max() < 1e-25


def test_twice_the_divergence_of_a_high_temperature() -> None:
    torch.manual_seed(0)
    student, teacher = (Distribution(torch.randn(4, 6, dtype=torch.float64)) for _ in range(2))
    torch.testing.assert_close(2 * ForwardKL(1000.0)(student, teacher, None), LogitMSE()(student, teacher, None), rtol=5e-3, atol=0)


def test_no_position_and_one_class() -> None:
    assert logit_mse(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
    assert logit_mse(torch.randn(3, 1), torch.randn(3, 1)).tolist() == [0, 0, 0]
