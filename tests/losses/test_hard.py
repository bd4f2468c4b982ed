import pytest
import torch
from sklearn.metrics import log_loss  # type: ignore[import-untyped]
from torch import Tensor

from distill.losses.hard import CrossEntropy, cross_entropy
from distill.losses.support import Distribution, log_probs


def reference_CrossEntropy(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:  # noqa: N802
    """−log of the probability that the student gives to the true class: −(z_y − log Σ_v exp z_v)."""
    rows = [z.logsumexp(0) - z[y] for z, y in zip(student_logits, labels, strict=True)]
    return torch.stack(rows) if rows else student_logits.sum(-1)  # no position: zero, still part of the graph


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
