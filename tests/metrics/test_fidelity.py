import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from distill.losses.divergence import forward_kl, reverse_kl
from distill.metrics import fidelity


def pair(seed: int = 0, n: int = 40, v: int = 9, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q, p = (2 * torch.randn(n, v, generator=rng, dtype=torch.float64) for _ in range(2))
    return q.log_softmax(-1).to(dtype), p.log_softmax(-1).to(dtype)


def test_entropy_is_that_of_scipy() -> None:
    logq, _ = pair()
    np.testing.assert_allclose(fidelity.entropy(logq, logq.exp()), stats.entropy(logq.exp(), axis=-1), rtol=1e-12)
    even = torch.full((1, 8), 1 / 8)
    assert fidelity.entropy(even.log(), even).item() == pytest.approx(np.log(8))


def test_divergences_are_those_of_scipy_and_of_the_losses() -> None:
    logq, logp = pair()
    kl, reverse = fidelity.divergences(logq, logq.exp(), logp, logp.exp())
    np.testing.assert_allclose(kl, stats.entropy(logp.exp(), logq.exp(), axis=-1), rtol=1e-12)
    np.testing.assert_allclose(reverse, stats.entropy(logq.exp(), logp.exp(), axis=-1), rtol=1e-12)
    np.testing.assert_allclose(kl, forward_kl(logq, logp), rtol=1e-12)
    np.testing.assert_allclose(reverse, reverse_kl(logq, logp), rtol=1e-12)


def test_divergences_of_nearly_the_same_are_right_in_float32() -> None:
    _, logp = pair(v=2000)
    logq = (logp + 3e-4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).log_softmax(-1)
    true = fidelity.divergences(logq, logq.exp(), logp, logp.exp())
    rounded = logq.float(), logp.float()
    found = fidelity.divergences(rounded[0], rounded[0].exp(), rounded[1], rounded[1].exp())
    for ours, exact in zip(found, true, strict=True):
        assert (ours >= 0).all()
        np.testing.assert_allclose(ours, exact, rtol=0.3)  # 3e-8; without the terms that cancel it is off by 0.96


def test_classes_that_one_side_rules_out_leave_the_divergence_finite() -> None:
    logq, logp = torch.tensor([[0.0, -1e5]]), torch.tensor([[0.5, 0.5]]).log()
    kl, reverse = fidelity.divergences(logq, logq.exp(), logp, logp.exp())
    assert kl.item() == pytest.approx(0.5 * np.log(0.5) + 0.5 * (np.log(0.5) + 1e5))
    assert reverse.item() == pytest.approx(np.log(2))


def test_overlap() -> None:
    ours, theirs = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([[3, 1, 2], [7, 8, 9], [9, 1, 0]])
    np.testing.assert_allclose(fidelity.overlap(ours, theirs), [1, 0, 1 / 3])


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_of_wrong_classes_are_those_of_scipy(ties: bool) -> None:
    logq, logp = pair(n=30, v=12, dtype=torch.float32)
    if ties:
        logq, logp = logq.round(), logp.round()
    labels = torch.arange(30) % 12
    ours, theirs = fidelity.wrong_ranks(logq, labels), fidelity.wrong_ranks(logp, labels)
    found = fidelity.rank_correlation(ours, theirs)
    for i, y in enumerate(labels.tolist()):
        others = np.delete(logq[i].numpy(), y)
        np.testing.assert_allclose(np.delete(ours[i].numpy(), y), stats.rankdata(others) - 6)  # their mean rank
        assert ours[i, y] == 0
        assert found[i].item() == pytest.approx(stats.spearmanr(others, np.delete(logp[i].numpy(), y)).statistic)


def test_the_label_plays_no_part_in_the_correlation() -> None:
    logq, logp = pair(dtype=torch.float32)
    labels = torch.zeros(len(logq), dtype=torch.long)
    moved = logq.clone()
    moved[:, 0] = torch.linspace(-9, 9, len(logq))
    before, after = (
        fidelity.rank_correlation(fidelity.wrong_ranks(each, labels), fidelity.wrong_ranks(logp, labels)) for each in (logq, moved)
    )
    np.testing.assert_array_equal(before, after)


def test_there_is_no_correlation_of_what_is_all_alike() -> None:
    even, logp = torch.zeros(1, 5), pair(n=1, v=5)[1].float()
    label = torch.tensor([2])
    found = fidelity.rank_correlation(fidelity.wrong_ranks(even, label), fidelity.wrong_ranks(logp, label))
    assert found.isnan().all()
    two = torch.tensor([[0.3, 0.7]]).log()
    assert fidelity.rank_correlation(*[fidelity.wrong_ranks(two, torch.tensor([1]))] * 2).isnan().all()


def test_the_correlation_of_many_classes_does_not_round() -> None:
    logp = torch.randn(2, 30_000, generator=torch.Generator().manual_seed(0))
    logq = logp + 1e-3 * torch.randn(2, 30_000, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 5])
    found = fidelity.rank_correlation(fidelity.wrong_ranks(logq, labels), fidelity.wrong_ranks(logp, labels))
    for i in range(2):
        true = stats.spearmanr(np.delete(logq[i].numpy(), labels[i]), np.delete(logp[i].numpy(), labels[i])).statistic
        assert 1 - found[i].item() == pytest.approx(1 - true, rel=1e-2)


def test_of_mistakes() -> None:
    labels, teacher, student = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 1, 1, 1, 1]), np.array([2, 1, 0, 2, 0, 1])
    found = fidelity.of_mistakes(student, teacher, labels)
    np.testing.assert_array_equal(found.same, [False, True, False, False, False, False])
    np.testing.assert_array_equal(found.right, [False, False, True, False, False, False])
    np.testing.assert_array_equal(found.other, [False, False, False, True, False, False])
