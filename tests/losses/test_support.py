import pytest
import torch

from distill.losses.support import Binned, Distribution, Known, Mixture, log_probs
from distill.types import ConfigError


def binned(student: Distribution, ids: torch.Tensor) -> Binned:
    return Binned(student, torch.where(ids < 0, ids[:, :1], ids), ids < 0)


def test_columns_beyond_the_classes_are_left_out_before_the_softmax() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0]])  # the third column would take all the mass
    torch.testing.assert_close(log_probs(logits, 2).exp(), torch.tensor([[0.5, 0.5]]))


def test_same_as_masking_with_minus_infinity() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64)
    masked = logits.clone()
    masked[:, 5:] = -torch.inf
    torch.testing.assert_close(log_probs(logits, 5), masked.log_softmax(-1)[:, :5])


def test_left_out_columns_get_a_gradient_of_exactly_zero() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    log_probs(logits, 5)[:, 2].sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 5:] == 0).all()
    assert logits.grad[:, :5].abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(given: torch.dtype, wanted: torch.dtype) -> None:
    logits = torch.randn(3, 4).to(given)
    found = log_probs(logits, 4)
    assert found.dtype == wanted
    torch.testing.assert_close(found, logits.double().log_softmax(-1).to(wanted))


def test_a_head_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(ConfigError, match="predicts 4 classes, but the data have 5"):
        log_probs(torch.zeros(1, 4), 5)


# ---- K classes and the tail


def test_known_bins_with_the_tail_last() -> None:
    known = Known(torch.tensor([[7, 2, -1]]), torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([0.3]), 2.0)
    torch.testing.assert_close(known.logp(2.0)[0, [0, 1, 3]].exp(), torch.tensor([0.5, 0.2, 0.3]))
    assert known.logp(2.0)[0, 2] < -1e4
    assert known.logp(2.0).isfinite().all()
    with pytest.raises(ConfigError, match=r"temperature=1, but the target was made with 2, and cannot be softened after"):
        known.logp()


def test_estimate_over_all_classes() -> None:
    known = Known(torch.tensor([[3, 0, -1], [2, -1, -1]]), torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]), torch.zeros(2), 1.0)
    assert known.dense(4).tolist() == [[0.25, 0, 0, 0.75], [0, 0, 1, 0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_student_on_bins_by_hand(temperature: float) -> None:
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]], dtype=torch.float64)
    ids = torch.tensor([[3, 1, -1]])
    e = (z[0] / temperature).exp()
    expected = torch.stack([e[3], e[1], e[0] + e[2] + e[4]]) / e.sum()
    known = Known(ids, torch.zeros(1, 3), torch.zeros(1), temperature)
    found = known.align(Distribution(z)).logp(temperature)[0]
    torch.testing.assert_close(found[[0, 1, 3]].exp(), expected)
    assert found[2] < -1e4


def test_a_students_tail_keeps_its_digits() -> None:
    z = torch.tensor([[0.0, -40.0, -41.0]])  # 1 − q_0 is 0 in float32
    found = binned(Distribution(z), torch.tensor([[0]])).logp()[0, 1]
    assert found.item() == pytest.approx(-40 + torch.tensor(-1.0, dtype=torch.float64).exp().log1p().item(), rel=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_spread_is_what_autograd_finds(temperature: float) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 0], [5, -1, -1], [2, 6, -1], [4, -1, 1]])
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    student = binned(Distribution(z), ids)
    log_q, p = student.logp(temperature), torch.rand(4, 4, dtype=torch.float64).masked_fill(torch.nn.functional.pad(ids < 0, (0, 1)), 0.0)
    (by_autograd,) = torch.autograd.grad((p * log_q).sum(), z)
    of_bins = p - log_q.detach().exp() * p.sum(-1, keepdim=True)  # of p · log-softmax with respect to the bins' logits
    spread = binned(Distribution(z.detach()), ids).spread(of_bins, temperature)
    torch.testing.assert_close(spread / temperature, by_autograd)


def test_each_temperature_has_its_own_bins() -> None:
    student = binned(Distribution(torch.randn(3, 6)), torch.tensor([[0, 1]] * 3))
    first, second = student.logp(1.0), student.logp(2.0)
    assert not torch.equal(first, second)
    assert student.logp(1.0) is first


def test_a_distribution_is_its_own_support() -> None:
    student, teacher, gradient = Distribution(torch.randn(2, 3)), Distribution(torch.randn(2, 3)), torch.randn(2, 3)
    assert teacher.align(student) is student
    assert student.spread(gradient, 2.0) is gradient


# ---- the mean of several


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_means_by_hand(temperature: float) -> None:
    a, b = torch.tensor([[0.6, 0.3, 0.1]]).log() * temperature, torch.tensor([[0.2, 0.2, 0.6]]).log() * temperature
    parts, weights = [Distribution(a), Distribution(b)], torch.tensor([[0.25, 0.75]])
    mean = torch.tensor([[0.3, 0.225, 0.475]])
    torch.testing.assert_close(Mixture(parts, weights, 3, geometric=False).logp(temperature).exp(), mean)
    product = torch.tensor([[0.6**0.25 * 0.2**0.75, 0.3**0.25 * 0.2**0.75, 0.1**0.25 * 0.6**0.75]])
    torch.testing.assert_close(Mixture(parts, weights, 3, geometric=True).logp(temperature).exp(), product / product.sum())


@pytest.mark.parametrize("geometric", [False, True])
def test_a_weight_of_nothing_leaves_a_teacher_out(geometric: bool) -> None:
    a, b = torch.tensor([[0.0, -torch.inf, 1.0]]).clamp(min=-1e5), torch.tensor([[3.0, 2.0, -torch.inf]]).clamp(min=-1e5)
    found = Mixture([Distribution(a), Distribution(b)], torch.tensor([[0.0, 1.0]]), 3, geometric).logp()
    torch.testing.assert_close(found.exp(), b.softmax(-1))
    assert found.isfinite().all()


def test_probabilities_of_a_mean() -> None:
    mean = Mixture([Distribution(torch.tensor([[0.5, 0.5]]).log())], torch.ones(1, 1), 2, geometric=False)
    torch.testing.assert_close(mean.probs(2.0), torch.tensor([[0.5, 0.5]]))


def test_a_mean_with_draws_needs_their_temperature() -> None:
    known = Known(torch.tensor([[1]]), torch.tensor([[1.0]]), torch.zeros(1), 2.0)
    mean = Mixture([Distribution(torch.zeros(1, 4)), known], torch.tensor([[0.6, 0.4]]), 4, geometric=False)
    torch.testing.assert_close(mean.logp(2.0).exp(), torch.tensor([[0.15, 0.55, 0.15, 0.15]]))
    with pytest.raises(ConfigError, match="made with 2"):
        mean.logp(1.0)
