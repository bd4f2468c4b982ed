import pytest
import torch
from torch import Tensor

from distill.losses.base import TokenLoss
from distill.losses.block import Terms, has_closed_form
from distill.losses.divergence import ForwardKL, ReverseKL
from distill.losses.hard import CrossEntropy
from distill.losses.support import Apart, Distribution, Known
from distill.types import ConfigError


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
        return Terms({"it": loss}, {"it": 1.0}, 5).gradients(student, Distribution(teacher), labels, each=False).flows[0]

    torch.testing.assert_close(flow(Doubled(2.0)), 2 * flow(ForwardKL(2.0)))
    torch.testing.assert_close(flow(DoubledWithItsOwn(2.0)), 2 * flow(ForwardKL(2.0)))


def test_closed_gradients_are_weighted_or_given_one_by_one() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])
    terms = Terms({"ce": CrossEntropy(), "kd": ForwardKL()}, {"ce": 0.25, "kd": 3.0}, 5)
    q, p = student.softmax(-1), teacher.softmax(-1)
    ce, kd = q - torch.eye(5)[labels], q - p
    each = terms.gradients(student, Distribution(teacher), labels, each=True).flows
    torch.testing.assert_close(each[0], ce)
    torch.testing.assert_close(each[1], kd)
    (total,) = terms.gradients(student, Distribution(teacher), labels, each=False).flows
    torch.testing.assert_close(total, 0.25 * ce + 3.0 * kd)


@pytest.mark.parametrize("hard", [CrossEntropy(), CrossEntropy(label_smoothing=0.1)], ids=["hard", "smoothed"])
def test_a_term_without_a_teacher_sees_all_classes_beside_a_sparse_target(hard: CrossEntropy) -> None:
    torch.manual_seed(0)
    student, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    known = Known(torch.tensor([[1, 2], [0, 3], [4, 1]]), torch.full((3, 2), 0.25), torch.full((3,), 0.5), 1.0)
    for with_kd in (False, True):
        losses: dict[str, TokenLoss] = {"ce": hard} | ({"kd": ForwardKL()} if with_kd else {})
        evaluated = Terms(losses, dict.fromkeys(losses, 1.0), 5).gradients(student, known, labels, each=True)
        leaf = student.clone().requires_grad_()
        value = torch.nn.functional.cross_entropy(leaf, labels, reduction="sum", label_smoothing=hard.label_smoothing)
        value.backward()
        torch.testing.assert_close(evaluated.sums[0], value.detach())
        torch.testing.assert_close(evaluated.flows[0], leaf.grad)


@pytest.mark.parametrize("each", [False, True])
def test_apart_by_closed_form_and_by_autograd(each: bool) -> None:
    torch.manual_seed(0)
    student, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    first, second = (
        torch.randn(3, 5),
        Known(
            torch.tensor([[1, 2], [0, -1], [4, 1]]), torch.tensor([[0.2, 0.3], [0.6, 0.0], [0.1, 0.1]]), torch.tensor([0.5, 0.4, 0.8]), 1.0
        ),
    )
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7]])
    q, p = student.softmax(-1), first.softmax(-1)
    # the tail's p is shared out as the student's own probabilities of its classes are
    shared = torch.zeros(3, 5)
    for n, (ids, probs, tail) in enumerate((((1, 2), (0.2, 0.3), 0.5), ((0,), (0.6,), 0.4), ((4, 1), (0.1, 0.1), 0.8))):
        rest = [v for v in range(5) if v not in ids]
        shared[n, rest] = tail * q[n, rest] / q[n, rest].sum()
        shared[n, list(ids)] = torch.tensor(probs)
    expected = w[:, :1] * (q - p) + w[:, 1:] * (q - shared)
    for loss in (ForwardKL(), Doubled()):
        factor = 2 if isinstance(loss, Doubled) else 1
        terms = Terms({"kd": loss}, {"kd": 1.0}, 5)
        assert terms.closed is (factor == 1)
        (flow,) = terms.gradients(student, Apart([Distribution(first), second], w), labels, each).flows
        torch.testing.assert_close(flow, factor * expected)


def test_a_value_that_is_not_one_per_position_is_refused_on_bins_too() -> None:
    class Averaged(ReverseKL):
        def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
            return super().divergence(student_logp_NV, teacher_logp_NV, labels_N).mean()

    known = Known(torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.5]), 1.0)
    with pytest.raises(ConfigError, match=r"model\.losses\.kd gives shape \[\] for 1 positions"):
        Terms({"kd": Averaged()}, {"kd": 1.0}, 5).sums(torch.randn(1, 5), known, torch.tensor([0]))


class Clipped(ForwardKL):
    """The values of forward KL with a gradient of its own."""

    def with_gradient(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        values, gradient = super().with_gradient(student, teacher, labels_N)
        return values, gradient.clamp(-0.01, 0.01)


def test_a_gradient_of_its_own_is_taken_on_known_classes_too() -> None:
    torch.manual_seed(0)
    student, labels = torch.randn(1, 5), torch.tensor([0])
    known = Known(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]), torch.tensor([0.25]), 1.0)
    (flow,) = Terms({"kd": Clipped()}, {"kd": 1.0}, 5).gradients(student, known, labels, each=False).flows
    assert flow.abs().max() == torch.tensor(0.01)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", [0.0, 0.25])
def test_a_target_of_another_precision_than_the_student(wide: torch.dtype, rest: float) -> None:
    narrow = torch.float64 if wide == torch.float32 else torch.float32
    student = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).to(wide)
    probs, tail = torch.tensor([[0.75 - rest, 0.25]], dtype=narrow), torch.tensor([rest], dtype=narrow)
    known = Known(torch.tensor([[1, 2]]), probs, tail, 1.0, no_tail=rest == 0)
    (flow,) = Terms({"kd": ForwardKL()}, {"kd": 1.0}, 5).gradients(student, known, torch.tensor([0]), each=False).flows
    q = student.softmax(-1)
    p = torch.zeros(1, 5, dtype=wide)
    p[0, 1], p[0, 2] = 0.75 - rest, 0.25
    p[0, [0, 3, 4]] = rest * q[0, [0, 3, 4]] / q[0, [0, 3, 4]].sum()
    assert flow.dtype == wide
    torch.testing.assert_close(flow, q - p, rtol=1e-5, atol=1e-6)
