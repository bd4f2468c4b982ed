import pytest
import torch
from torch import Tensor

from distill.losses.base import TokenLoss
from distill.losses.block import Terms, has_closed_form
from distill.losses.divergence import ForwardKL, ReverseKL
from distill.losses.hard import CrossEntropy
from distill.losses.support import Distribution


class Doubled(ForwardKL):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return 2 * super().divergence(student_logp_NV, teacher_logp_NV, labels_N)


class DoubledWithItsOwn(Doubled):
    def with_gradient(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        values, gradient = super().with_gradient(student, teacher, labels_N)
        return 2 * values, 2 * gradient


class Renamed(ForwardKL):
    pass


@pytest.mark.parametrize(
    ("cls", "closed"),
    [(CrossEntropy, True), (ForwardKL, True), (Renamed, True), (DoubledWithItsOwn, True), (ReverseKL, False), (Doubled, False)],
)
def test_closed_form_belongs_to_the_class_that_defines_the_formula(cls: type[TokenLoss], closed: bool) -> None:
    assert has_closed_form(cls) is closed


def test_subclass_with_another_formula_gets_its_own_gradient() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])

    def flow(loss: TokenLoss) -> Tensor:
        return Terms({"it": loss}, {"it": 1.0}, 5).gradients(student, teacher, labels, each=False).flows[0]

    torch.testing.assert_close(flow(Doubled(2.0)), 2 * flow(ForwardKL(2.0)))
    torch.testing.assert_close(flow(DoubledWithItsOwn(2.0)), 2 * flow(ForwardKL(2.0)))


def test_closed_gradients_are_weighted_or_given_one_by_one() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])
    terms = Terms({"ce": CrossEntropy(), "kd": ForwardKL()}, {"ce": 0.25, "kd": 3.0}, 5)
    q, p = student.softmax(-1), teacher.softmax(-1)
    ce, kd = q - torch.eye(5)[labels], q - p
    each = terms.gradients(student, teacher, labels, each=True).flows
    torch.testing.assert_close(each[0], ce)
    torch.testing.assert_close(each[1], kd)
    (total,) = terms.gradients(student, teacher, labels, each=False).flows
    torch.testing.assert_close(total, 0.25 * ce + 3.0 * kd)
