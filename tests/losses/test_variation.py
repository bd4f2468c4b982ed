import pytest
import torch
from scipy.spatial.distance import cityblock  # type: ignore[import-untyped]
from torch import Tensor

from distill.losses.support import Distribution
from distill.losses.variation import TotalVariation, total_variation


def reference_TotalVariation(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² ½ Σ_v |p_v − q_v|."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    return (p - q).abs().sum(-1) / 2 * (temperature**2 if t_squared else 1)


def test_by_hand() -> None:
    # (0.7, 0.2, 0.1) against (0.4, 0.4, 0.2): 0.3 has to move
    teacher, student = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.4, 0.4, 0.2]]).log()
    assert total_variation(student, teacher).item() == pytest.approx(0.3, abs=1e-7)
    assert total_variation(teacher, student).item() == pytest.approx(0.3, abs=1e-7)


def test_against_scipy() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    expected = [cityblock(p, q) / 2 for p, q in zip(teacher.softmax(-1), student.softmax(-1), strict=True)]
    ours = total_variation(student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_one_where_they_share_nothing() -> None:
    assert total_variation(torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])).item() == 1.0


def test_goes_as_one_over_t() -> None:
    torch.manual_seed(0)
    student, teacher = (Distribution(torch.randn(6, 9, dtype=torch.float64)) for _ in range(2))
    at = [TotalVariation(t, t_squared=False)(student, teacher, None) * t for t in (1e3, 1e4)]
    torch.testing.assert_close(at[0], at[1], rtol=1e-2, atol=0)


def test_gradient_by_hand() -> None:
    # student (1/2, 1/2), teacher (3/4, 1/4): ½(|p0 − q0| + |p1 − q1|) = p0 − q0, and ∂q0/∂z = q0 (1 − q0), −q0 q1
    logits = torch.zeros(1, 2, requires_grad=True)
    total_variation(logits.log_softmax(-1), torch.tensor([[0.75, 0.25]]).log()).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25]]))


def test_no_position_and_one_class() -> None:
    assert total_variation(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
    assert total_variation(torch.zeros(3, 1), torch.zeros(3, 1)).tolist() == [0, 0, 0]
