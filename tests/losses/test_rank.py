import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from scipy.stats import bernoulli, entropy  # type: ignore[import-untyped]
from torch import Tensor

from distill.losses.base import TokenLoss
from distill.losses.rank import PairwiseRank, PlackettLuce, pairwise_rank, plackett_luce, top_wrong
from distill.losses.support import Distribution
from distill.types import ConfigError
from tests.losses.dense import Case, Reference, assert_close

# The conformance suite compares bfloat16 with unrounded float64 at V = 50; where k cuts there, the rounding exchanges the k-th class with
# the next, and the two are about different classes. With k ≥ V − 1 there is no cut; it cuts in its V of 300 and 32,000. Small k: below.
settings_PairwiseRank = settings_PlackettLuce = [{"k": 60}]  # noqa: N816


def chosen(teacher: Tensor, label: int, k: int) -> list[int]:
    """The k likeliest classes without the label, of equal ones the first."""
    row = teacher.tolist()
    return sorted((v for v in range(len(row)) if v != label), key=lambda v: (-row[v], v))[:k]


def reference_PairwiseRank(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, k: int = 10, temperature: float = 1.0, t_squared: bool = True
) -> Tensor:
    """T² times the mean over pairs of a log(a / b) + a' log(a' / b'), a = σ((t_i − t_j) / T), a' = σ((t_j − t_i) / T), b of the student."""
    values = []
    for s, t, y in zip(student_logits, teacher_logits, labels.tolist(), strict=True):
        pairs = list(combinations(chosen(t, y, k), 2))
        i, j = [i for i, _ in pairs], [j for _, j in pairs]
        a, b = (1 / (1 + torch.exp((z[j] - z[i]) / temperature)) for z in (t, s))
        not_a, not_b = (1 / (1 + torch.exp((z[i] - z[j]) / temperature)) for z in (t, s))
        values.append((a * (a / b).log() + not_a * (not_a / not_b).log()).sum() / max(1, len(pairs)))
    value = torch.stack(values) if values else student_logits.sum(-1)
    return value * temperature**2 if t_squared else value


def reference_PlackettLuce(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, k: int = 10) -> Tensor:  # noqa: N802
    """−Σ_i log(exp(s_i) / Σ_j exp(s_j)), i from the teacher's likeliest class down, j over those that are not above i."""
    values = []
    for s, t, y in zip(student_logits, teacher_logits, labels.tolist(), strict=True):
        order = chosen(t, y, k)
        parts = [s[[j for j in order if t[j] <= t[i]]].exp().sum().log() - s[i] for i in order]
        values.append(torch.stack(parts).sum() if parts else 0 * s.sum())
    return torch.stack(values) if values else student_logits.sum(-1)


def scores(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("cls", "reference", "given"),
    [(PairwiseRank, reference_PairwiseRank, {"temperature": t}) for t in (1.0, 3.0)] + [(PlackettLuce, reference_PlackettLuce, {})],
)
@pytest.mark.parametrize("k", [2, 3, 10])
def test_few_classes_of_many(cls: type[TokenLoss], reference: Reference, given: dict[str, Any], k: int) -> None:
    for seed, dtype, tolerance in ((0, torch.float32, 1e-5), (1, torch.float64, 1e-10)):
        case = Case.random(seed=seed, shape=(4, 16), num_classes=50, dtype=dtype)
        assert_close(case.chunked(cls(k=k, **given), chunk=16), case.dense(reference, k=k, **given), tolerance)


def test_the_label_is_left_out_and_ties_go_to_the_lower_number() -> None:
    teacher = torch.tensor([[5.0, 1, 3, 3, 4, 3], [0.0, 0, 0, 0, 0, 0]])
    assert top_wrong(teacher, torch.tensor([4, 1]), 2).tolist() == [[0, 2], [0, 2]]
    assert top_wrong(teacher, torch.tensor([0, 0]), 3).tolist() == [[2, 3, 4], [1, 2, 3]]
    assert top_wrong(teacher, torch.tensor([0, 0]), 99).tolist() == [[1, 2, 3, 4, 5]] * 2


# ---- pairwise


def test_pairs_by_hand() -> None:
    # label 0; teacher prefers class 1 to class 2 with 3/4, the student with 1/2: KL of (3/4, 1/4) from (1/2, 1/2)
    teacher, student = torch.tensor([[9.0, math.log(3), 0.0]]), torch.tensor([[-9.0, 0.0, 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert pairwise_rank(student, teacher, torch.tensor([0])).item() == pytest.approx(expected, abs=1e-6)


def test_pairs_against_scipy() -> None:
    student, teacher = scores(1, 4)
    found = pairwise_rank(student, teacher, torch.tensor([3]), k=3).item()
    parts = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = (float(torch.sigmoid(z[0, i] - z[0, j])) for z in (teacher, student))
        parts.append(entropy(bernoulli(a).pmf([0, 1]), bernoulli(b).pmf([0, 1])))
    assert found == pytest.approx(sum(parts) / 3)


def test_pairs_are_zero_where_the_differences_are_the_teachers() -> None:
    student, teacher = scores(5, 8)
    labels = torch.tensor([0, 1, 2, 3, 7])
    assert pairwise_rank(teacher + torch.randn(5, 1), teacher, labels).abs().max() < 1e-15
    assert (pairwise_rank(student, teacher, labels) > 1e-3).all()
    changed = teacher.scatter(-1, labels[:, None], -3.0)  # the label's own score takes no part
    assert pairwise_rank(changed, teacher, labels).abs().max() < 1e-15


def test_pairs_do_not_see_the_order_of_the_classes() -> None:
    student, teacher = scores(1, 6)
    shuffled = torch.tensor([3, 5, 0, 1, 2, 4])
    mine = pairwise_rank(student[:, shuffled], teacher[:, shuffled], torch.tensor([2]), k=4)
    torch.testing.assert_close(mine, pairwise_rank(student, teacher, torch.tensor([0]), k=4))


def test_pairs_gradient() -> None:
    student, teacher = (z.requires_grad_() for z in scores(3, 6))
    assert torch.autograd.gradcheck(lambda s, t: pairwise_rank(s, t, torch.tensor([0, 5, 2]), k=4), (student, teacher))


def test_pairs_that_are_certain_stay_finite() -> None:
    student, teacher = torch.tensor([[0.0, -1e4, 1e4]], requires_grad=True), torch.tensor([[0.0, 1e4, -1e4]])
    value = pairwise_rank(student, teacher, torch.tensor([0])).sum()
    value.backward()
    assert value.item() == pytest.approx(2e4)
    torch.testing.assert_close(student.grad, torch.tensor([[0.0, -1.0, 1.0]]))


# ---- listwise


def test_order_by_hand() -> None:
    # label 0; the teacher's order of the others is 2, 1, 3. Student's exp: 1 → 2, 2 → 1, 3 → 3: P = 1/6 · 2/5 · 3/3 = 1/15
    teacher, student = torch.tensor([[9.0, 2, 3, 1]]), torch.tensor([[9.0, 2, 1, 3]]).log()
    assert plackett_luce(student, teacher, torch.tensor([0])).item() == pytest.approx(math.log(15), abs=1e-6)
    # the likeliest two alone, 2 before 1: P = 1/3
    assert plackett_luce(student, teacher, torch.tensor([0]), k=2).item() == pytest.approx(math.log(3), abs=1e-6)


def test_the_probabilities_of_all_orders_sum_to_one() -> None:
    student, _ = scores(1, 5)
    total = 0.0
    for order in permutations(range(4)):
        teacher = torch.tensor([[*(float(x) for x in order), 99.0]], dtype=torch.float64)
        total += math.exp(-plackett_luce(student, teacher, torch.tensor([4])).item())
    assert total == pytest.approx(1.0)


def test_only_the_order_of_the_teacher_counts() -> None:
    student, teacher = scores(4, 7)
    labels = torch.tensor([0, 3, 6, 2])
    expected = plackett_luce(student, teacher, labels)
    torch.testing.assert_close(plackett_luce(student + 3, 10 * teacher - 5, labels), expected)
    sure = plackett_luce(100 * teacher, teacher, labels)  # the right order, with confidence
    assert (sure < expected).all()
    assert (sure < 0.5).all()


def test_a_tie_is_drawn_among_all_of_it_by_hand() -> None:
    # classes 1 and 2 tie above class 3, all with the same score: 1/3 · 1/3 · 1, whichever number is which
    zeros = torch.zeros(1, 4)
    for teacher in ([9.0, 2, 2, 1], [9.0, 1, 2, 2], [9.0, 2, 1, 2]):
        assert plackett_luce(zeros, torch.tensor([teacher]), torch.tensor([0])).item() == pytest.approx(2 * math.log(3), abs=1e-6)


def test_order_gradient() -> None:
    student, teacher = scores(3, 6)
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, teacher, torch.tensor([0, 5, 2]), k=4), (student.requires_grad_(),))


# ---- both


@pytest.mark.parametrize("loss", [PairwiseRank(), PlackettLuce()])
@pytest.mark.parametrize("num_classes", [1, 2])
def test_nothing_to_compare_is_zero(loss: TokenLoss, num_classes: int) -> None:
    student = torch.randn(3, num_classes, requires_grad=True)
    value = loss(Distribution(student), Distribution(torch.randn(3, num_classes)), torch.zeros(3, dtype=torch.long))
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("loss", [PairwiseRank(), PlackettLuce()])
def test_no_position(loss: TokenLoss) -> None:
    for num_classes in (1, 2, 5):
        nothing = Distribution(torch.empty(0, num_classes))
        assert loss(nothing, nothing, torch.empty(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("cls", [PairwiseRank, PlackettLuce])
def test_fewer_than_two_classes_are_refused(cls: type[PlackettLuce]) -> None:
    with pytest.raises(ConfigError, match="k must be at least 2, got 1"):
        cls(k=1)
