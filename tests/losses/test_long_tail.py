import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import TokenLoss
from distill.losses.class_weighted import FrequencyPower
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.losses.long_tail import LTKD, BalancedKD, BalancedSoftmax, LogitAdjusted, by_frequency
from distill.losses.support import Distribution
from distill.schedule import BatchAwareTemperature, Linear
from distill.types import ConfigError
from tests.losses.dense import counts, setting

settings_LogitAdjusted = [{}, {"tau": 0.5}, {"tau": 2.0}]  # noqa: N816
settings_BalancedKD = [{}, {"class_weights": FrequencyPower(0.5)}, {"t_squared": False}]  # noqa: N816
settings_LTKD = [{}, {"alpha": 2.0, "beta": 0.3}, {"groups": 5, "t_squared": False}]  # noqa: N816


def per_row(value: object, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    rows = [value(s, t, y) for s, t, y in zip(student, teacher, labels, strict=True)]  # type: ignore[operator]
    return torch.stack(rows) if rows else student.sum(-1)  # no position: zero, still part of the graph


def reference_LogitAdjusted(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, tau: float = 1.0) -> Tensor:  # noqa: N802
    """log[1 + Σ_{y' ≠ y} (π_y' / π_y)^τ exp(z_y' − z_y)], the second form of the paper's equation 10."""
    n = counts(student_logits.shape[-1]).double()

    def value(z: Tensor, _: Tensor, y: Tensor) -> Tensor:
        terms = tau * (n / n[y]).log() + z - z[y]
        return terms.logsumexp(0)  # the y-th is 0: the 1

    return per_row(value, student_logits, teacher_logits, labels)


def reference_BalancedSoftmax(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:  # noqa: N802
    """−log (n_y exp z_y / Σ_v n_v exp z_v)."""
    n = counts(student_logits.shape[-1]).double()
    return per_row(lambda z, _, y: (z + n.log()).logsumexp(0) - z[y] - n[y].log(), student_logits, teacher_logits, labels)


def reference_BalancedKD(  # noqa: N802
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    class_weights: FrequencyPower | None = None,
    temperature: float = 2.0,
    t_squared: bool = True,
) -> Tensor:
    """T² Σ_v p̂_v (log p̂_v − log q_v), p̂ = w p / Σ w p, w = 1/E_n with β = 0.9999, or n^(−1/2) with the cap 10 that these counts miss."""
    n = counts(student_logits.shape[-1]).double()
    w = n**-0.5 if class_weights else 1e-4 / (1 - 0.9999**n)

    def value(s: Tensor, t: Tensor, _: Tensor) -> Tensor:
        log_q, p = (s / temperature).log_softmax(0), (t / temperature).softmax(0)
        p_hat = w * p / (w * p).sum()
        return (p_hat * (p_hat.clamp(min=1e-300).log() - log_q)).sum() * (temperature**2 if t_squared else 1)

    return per_row(value, student_logits, teacher_logits, labels)


def reference_LTKD(  # noqa: N802
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    groups: int = 3,
    t_squared: bool = True,
) -> Tensor:
    """T² (α KL(p̂_G ‖ q_G) + β Σ_G KL(p_{·|G} ‖ q_{·|G})), with probabilities and a loop over the groups."""
    n = counts(student_logits.shape[-1]).tolist()
    size, groups = len(n), min(groups, len(n))
    ranked = sorted(range(size), key=lambda v: -n[v])
    borders = [round(size * g / groups) for g in range(groups + 1)]
    members = [ranked[a:b] for a, b in pairwise(borders)]
    softened = [k ** (1 / temperature) for k in n]
    m = [sum(softened[v] for v in group) / sum(softened) for group in members]

    def value(s: Tensor, t: Tensor, _: Tensor) -> Tensor:
        q, p = (s / temperature).softmax(0), (t / temperature).softmax(0)
        q_g, p_g = torch.stack([q[g].sum() for g in members]), torch.stack([p[g].sum() for g in members])
        p_hat = p_g / torch.tensor(m, dtype=p.dtype)
        p_hat = p_hat / p_hat.sum()
        total = alpha * (p_hat * (p_hat / q_g).log()).sum()
        for i, g in enumerate(members):
            inner_p, inner_q = p[g] / p_g[i], q[g] / q_g[i]
            total = total + beta * (inner_p * (inner_p / inner_q).log()).sum()
        return total * (temperature**2 if t_squared else 1)

    return per_row(value, student_logits, teacher_logits, labels)


def ready(loss: TokenLoss, n: list[int]) -> TokenLoss:
    loss.prepare(setting(len(n), class_counts=lambda: torch.tensor(n)))
    return loss


def test_logit_adjustment_by_hand() -> None:
    # equal logits, counts 3 and 1: the prior itself, −ln 3/4 and −ln 1/4; at τ = 2 it is 9 : 1
    student, labels = Distribution(torch.zeros(2, 2)), torch.tensor([0, 1])
    expected = -torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(ready(LogitAdjusted(), [3, 1])(student, None, labels), expected)
    torch.testing.assert_close(ready(BalancedSoftmax(), [3, 1])(student, None, labels), expected)
    torch.testing.assert_close(ready(LogitAdjusted(2.0), [3, 1])(student, None, labels), -torch.tensor([0.9, 0.1]).log())


def test_without_adjustment_it_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(
        ready(LogitAdjusted(0.0), [9, 4, 1])(Distribution(logits), None, labels), F.cross_entropy(logits, labels, reduction="none")
    )


def test_the_prior_alone_is_the_best_that_a_blind_student_can_do_and_needs_no_logits() -> None:
    """Over data with counts 6, 3, 1 and no input, zero logits are stationary: such a student prefers no class."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = torch.zeros(1, 3, requires_grad=True)
    ready(LogitAdjusted(), [6, 3, 1])(Distribution(logits.expand(10, 3)), None, labels).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_balanced_kd_by_hand() -> None:
    # counts 3 and 1, weights 1/n: p = (3/4, 1/4) becomes (1/4, 1/4) / (1/2), uniform; the student is (4/5, 1/5)
    loss = ready(BalancedKD(FrequencyPower(1.0), temperature=1.0), [3, 1])
    student, teacher = (Distribution(torch.tensor([p]).log()) for p in ([0.8, 0.2], [0.75, 0.25]))
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert loss(student, teacher, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


def test_balanced_kd_with_equal_classes_is_plain_distillation() -> None:
    torch.manual_seed(0)
    student, teacher, labels = Distribution(torch.randn(5, 4)), Distribution(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(ready(BalancedKD(), [7, 7, 7, 7])(student, teacher, labels), ForwardKL(2.0)(student, teacher, labels))


def test_balanced_kd_against_torch() -> None:
    """As the authors write it, with torch's kl_div."""
    torch.manual_seed(0)
    s, t, n = torch.randn(8, 6), torch.randn(8, 6), torch.tensor([5000, 900, 300, 50, 9, 2])
    w = (1 - 0.9999) / (1 - 0.9999 ** n.double())
    target = (t / 3).softmax(-1).double() * w / w.sum() * 6
    target = target / target.sum(-1, keepdim=True)
    expected = F.kl_div((s.double() / 3).log_softmax(-1), target, reduction="none").sum(-1) * 9
    found = ready(BalancedKD(temperature=3.0), n.tolist())(Distribution(s), Distribution(t), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_groups_of_classes() -> None:
    found = [part.tolist() for part in by_frequency(torch.tensor([1, 9, 5, 5, 7, 2]), 3)]
    assert found == [[1, 4], [2, 3], [5, 0]]
    assert [len(part) for part in by_frequency(torch.arange(100), 3)] == [33, 34, 33]  # the paper's shares
    assert [part.tolist() for part in by_frequency(torch.tensor([1, 2]), 3)] == [[1], [0]]
    assert [part.tolist() for part in by_frequency(torch.tensor([4]), 3)] == [[0]]


def test_ltkd_by_hand() -> None:
    # counts 2, 1, 1 in two groups {0, 1}, {2} (round(1.5) = 2) of prior 3/4, 1/4. Teacher (1/2, 1/4, 1/4): masses 3/4, 1/4, corrected
    # 1/2, 1/2. Student (1/4, 1/4, 1/2): masses 1/2, 1/2, so no cross-group part; inside {0, 1} 2/3, 1/3 against 1/2, 1/2
    student, teacher = (Distribution(torch.tensor([p]).log()) for p in ([0.25, 0.25, 0.5], [0.5, 0.25, 0.25]))
    inner = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    found = [
        ready(LTKD(alpha=a, beta=b, groups=2), [2, 1, 1])(student, teacher, torch.tensor([0])).item() for a, b in ((1, 0), (0, 1), (1, 1))
    ]
    assert found == pytest.approx([0, inner, inner], abs=1e-7)


def test_ltkd_is_kl_where_there_is_nothing_to_correct() -> None:
    """With one group all is inside it; with equal counts, as many groups as classes and β = 0 all is between them."""
    torch.manual_seed(0)
    student, teacher, labels = Distribution(torch.randn(5, 6)), Distribution(torch.randn(5, 6)), torch.zeros(5, dtype=torch.long)
    expected = ForwardKL(2.0)(student, teacher, labels)
    torch.testing.assert_close(ready(LTKD(2.0, groups=1), [9, 1, 4, 4, 2, 7])(student, teacher, labels), expected)
    torch.testing.assert_close(ready(LTKD(2.0, beta=0.0, groups=6), [3] * 6)(student, teacher, labels), expected)


def test_ltkd_takes_a_teacher_that_knows_only_the_prior_for_no_preference() -> None:
    """Whatever T, its corrected masses are uniform: a student of uniform masses, equal inside, has no loss."""
    n = torch.tensor([3, 60, 10, 1, 20, 6])
    teacher = Distribution(n.log()[None].float())
    for temperature in (1.0, 2.0, 5.0):
        even = n.double().log() / temperature
        for pair in ([1, 4], [2, 5], [0, 3]):
            even[pair] = even[pair].log_softmax(0)
        student = Distribution((temperature * even)[None].float())
        assert ready(LTKD(temperature), n.tolist())(student, teacher, torch.tensor([0])).item() == pytest.approx(0, abs=1e-5)


def test_summary_of_the_groups() -> None:
    assert ready(LTKD(), [60, 20, 10, 6, 3, 1]).summary() == ["groups: 2 classes with 80.0%, 2 classes with 16.0%, 2 classes with 4.0%"]


@pytest.mark.parametrize("make", [BalancedKD, LTKD])
def test_temperature_follows_its_schedule(make: type) -> None:
    moving, fixed = ready(make(temperature=Linear(4.0, 2.0)), [5, 2, 1]), ready(make(temperature=3.0), [5, 2, 1])
    moving.at(5, 10)
    assert moving.scheduled() == {"temperature": 3.0}
    student, teacher, labels = Distribution(torch.tensor([[1.0, 0, 2]])), Distribution(torch.tensor([[0.0, 3, 1]])), torch.tensor([0])
    torch.testing.assert_close(moving(student, teacher, labels), fixed(student, teacher, labels))


@pytest.mark.parametrize("make", [BalancedKD, LTKD])
def test_temperature_follows_the_batch(make: type) -> None:
    loss = make(temperature=BatchAwareTemperature(2.0, 128), t_squared=False)
    loss.prepare(setting(3, batch_size=8))
    assert loss.scheduled() == {"temperature": 4.0}  # 2 · (8/128)^(−1/4)


@pytest.mark.parametrize("make", [LogitAdjusted, BalancedSoftmax, BalancedKD, LTKD])
def test_never_occurring_classes_no_checkpoint_and_no_position(make: type) -> None:
    loss = make()
    with pytest.raises(
        ConfigError, match=r"model\.losses\.it needs the frequency of every class, but no training row has the label 'class1'"
    ):
        ready(loss, [3, 0, 1])
    loss.prepare(setting(3, "token", class_counts=lambda: torch.tensor([3, 0, 1])))
    again = make()
    again.prepare(setting(3, class_counts=lambda: torch.tensor([3, 1, 1])))
    assert not loss.state_dict()
    torch.manual_seed(0)
    case = Distribution(torch.randn(4, 3)), Distribution(torch.randn(4, 3)), torch.tensor([0, 1, 2, 0])
    # in a vocabulary, never is once; only the other classes' shares of the larger total change nothing here
    torch.testing.assert_close(loss(*case), again(*case))
    empty = Distribution(torch.zeros(0, 3))
    assert loss(empty, empty, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("make", [LogitAdjusted, BalancedKD, LTKD])
def test_prepare_where_new_tensors_are_made_elsewhere(make: type) -> None:
    n, case = [3, 2, 1], (Distribution(torch.eye(3)), Distribution(torch.ones(3, 3)), torch.arange(3))
    counted = torch.tensor(n)
    loss, given = make(), setting(3, class_counts=lambda: counted)
    with torch.device("meta"):
        loss.prepare(given)
    torch.testing.assert_close(loss(*case), ready(make(), n)(*case))


@pytest.mark.parametrize(
    "make", [lambda: LogitAdjusted(-1.0), lambda: LTKD(alpha=-1.0), lambda: LTKD(alpha=0.0, beta=0.0), lambda: LTKD(groups=0)]
)
def test_numbers_out_of_range(make: type) -> None:
    with pytest.raises(ConfigError, match="got"):
        make()


def test_needs_teacher() -> None:
    assert {cls.__name__ for cls in (LogitAdjusted, BalancedSoftmax, BalancedKD, LTKD, CrossEntropy) if cls.needs_teacher} == {
        "BalancedKD",
        "LTKD",
    }
