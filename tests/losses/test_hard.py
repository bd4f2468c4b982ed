import copy

import pytest
import torch
from sklearn.metrics import log_loss  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from distill.losses.class_weighted import FrequencyPower
from distill.losses.hard import CrossEntropy, ZLoss, cross_entropy
from distill.losses.support import Distribution, log_probs
from distill.types import ConfigError
from tests.losses.dense import counts, setting

settings_CrossEntropy = [  # noqa: N816
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.3, "class_weights": FrequencyPower(1.0, cap=None)},
]


def reference_CrossEntropy(  # noqa: N802
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    class_weights: FrequencyPower | None = None,
) -> Tensor:
    """(1 − ε) w_y (−log q_y) + ε/V Σ_v w_v (−log q_v), with w_v ∝ 1/n_v of mean 1 over the samples: w_v = (Σ n / V) / n_v."""
    n = counts(student_logits.shape[-1]).double()
    w = torch.ones_like(n) if class_weights is None else n.mean() / n
    rows = []
    for z, y in zip(student_logits, labels, strict=True):
        surprise = z.logsumexp(0) - z
        rows.append((1 - label_smoothing) * w[y] * surprise[y] + label_smoothing * (w * surprise).sum() / len(z))
    return torch.stack(rows) if rows else student_logits.sum(-1)  # no position: zero, still part of the graph


def reference_ZLoss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:  # noqa: N802
    """(log Σ_v exp z_v)²."""
    highest = student_logits.amax(-1)
    return (highest + (student_logits - highest[:, None]).exp().sum(-1).log()) ** 2


def test_by_hand() -> None:
    logp = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    expected = torch.tensor([1.3862944, 0.2231436])  # −ln 1/4, −ln 0.8
    torch.testing.assert_close(cross_entropy(logp, torch.tensor([1, 2])), expected)


def test_against_sklearn() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 7, dtype=torch.float64), torch.randint(7, (50,))
    ours = cross_entropy(log_probs(logits, 7), labels).mean()
    assert ours.item() == pytest.approx(log_loss(labels, logits.softmax(-1), labels=range(7)), abs=1e-12)


def test_needs_no_teacher() -> None:
    logp = torch.tensor([[0.5, 0.5]]).log()
    assert CrossEntropy.needs_teacher is False
    assert CrossEntropy()(Distribution(logp), None, torch.tensor([0])).item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_and_weights_as_in_torch(smoothing: float, weighted: bool) -> None:
    torch.manual_seed(0)
    logits, labels, n = torch.randn(40, 7), torch.randint(7, (40,)), torch.tensor([50.0, 3, 9, 1, 20, 4, 4])
    loss = CrossEntropy(smoothing, FrequencyPower(0.5, cap=None) if weighted else None)
    loss.prepare(setting(7, class_counts=lambda: n.long()))
    w = n**-0.5 * n.sum() / (n**0.5).sum() if weighted else None
    expected = F.cross_entropy(logits, labels, weight=w, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss(Distribution(logits), None, labels), expected)


def test_weights_of_the_hard_term_are_in_no_checkpoint() -> None:
    loss = CrossEntropy(class_weights=FrequencyPower())
    loss.prepare(setting(5))
    assert not loss.state_dict()
    copy.deepcopy(CrossEntropy()).load_state_dict(loss.state_dict(), strict=True)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing must be in \[0, 1\), got"):
        CrossEntropy(smoothing)


def test_z_loss_by_hand() -> None:
    # Z = 1 + 1 and Z = e³ · 2: squares of ln 2 and 3 + ln 2
    student = Distribution(torch.tensor([[0.0, 0.0], [3.0, 3.0]]))
    torch.testing.assert_close(ZLoss()(student, None, torch.tensor([0, 1])), torch.tensor([0.4804530, 13.6393364]))
    assert ZLoss.needs_teacher is False


def test_no_position() -> None:
    empty = Distribution(torch.zeros(0, 4)), None, torch.zeros(0, dtype=torch.long)
    loss = CrossEntropy(0.1, FrequencyPower())
    loss.prepare(setting(4))
    for each in (CrossEntropy(), loss, ZLoss()):
        assert each(*empty).shape == (0,)
