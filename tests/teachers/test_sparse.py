from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, float64

from distill.losses.divergence import ForwardKL
from distill.losses.support import Distribution, Known
from distill.teachers.sparse import Sparse, sparse_target
from distill.types import ConfigError

V = 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(n: int = 6, v: int = V, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, v, generator=generator(), dtype=float64).mul(2).to(dtype)


def softmax(values: Tensor, temperature: float = 1.0) -> Any:
    """In float64, from the formula."""
    z = values.double().numpy() / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(target: Sparse, v: int = V) -> Tensor:
    known = torch.zeros(len(target.ids), v, dtype=target.probs.dtype)
    return known.scatter_add_(-1, target.ids.clamp(min=0), target.probs)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_likeliest_classes_and_the_mass_of_the_rest(temperature: float) -> None:
    z = logits()
    target, p = sparse_target(z, 5, 0, temperature), softmax(z, temperature)
    order = np.argsort(-p, -1)
    assert np.array_equal(target.ids.numpy(), order[:, :5])
    np.testing.assert_allclose(target.probs.numpy(), np.take_along_axis(p, order[:, :5], -1), rtol=1e-5)
    np.testing.assert_allclose(target.tail.numpy(), np.take_along_axis(p, order[:, 5:], -1).sum(-1), rtol=1e-5)


def test_a_tail_far_below_rounding_keeps_its_digits() -> None:
    z = torch.tensor([[30.0, 1.0, 0.5, 0.0]])
    target, p = sparse_target(z, 1, 0), softmax(z)
    assert target.probs.item() == 1.0
    assert target.tail.item() == pytest.approx(p[0, 1:].sum(), rel=1e-5)


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("k", [V, V + 1, 10_000])
def test_all_classes_leave_no_tail(k: int, draws: int) -> None:
    target = sparse_target(logits(), k, draws, generator=generator())
    assert target.tail.tolist() == [0.0] * 6
    np.testing.assert_allclose(dense(target).numpy(), softmax(logits()), rtol=1e-5)


@pytest.mark.parametrize(("k", "draws"), [(1, 0), (7, 0), (V, 0), (0, 1), (0, 50), (7, 50), (39, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_all_sum_up_to_one(k: int, draws: int, dtype: torch.dtype) -> None:
    target = sparse_target(logits(50, dtype=dtype) * 3, k, draws, generator=generator())
    assert target.ids.dtype == torch.int64
    assert target.probs.dtype == target.tail.dtype == dtype
    assert (target.probs.sum(-1) + target.tail - 1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)
    assert (target.ids[:, 0] >= 0).all()
    assert (target.probs[target.ids < 0] == 0).all()
    for row in target.ids.tolist():
        known = [i for i in row if i >= 0]
        assert len(set(known)) == len(known)
        assert set(known) <= set(range(V))


def test_draws_are_counts() -> None:
    counts = sparse_target(logits(), 0, 9, generator=generator()).probs * 9
    assert torch.allclose(counts, counts.round(), atol=1e-5)
    assert counts.sum(-1).tolist() == pytest.approx([9.0] * 6)


@pytest.mark.parametrize("k", [0, 4])
def test_draws_are_right_on_average_and_as_scattered_as_said(k: int) -> None:
    times, draws = 4000, 12
    z = logits(1, dtype=float64)
    p = torch.from_numpy(softmax(z))[0]
    drawn = dense(sparse_target(z.expand(times, -1), k, draws, generator=generator()))
    among = torch.zeros(V, dtype=torch.bool)
    among[p.topk(k).indices] = True
    rest = p[~among].sum()
    variance = torch.where(among, 0.0, p * (rest - p) / draws)
    assert ((drawn.mean(0) - p).abs() <= 4 * (variance / times).sqrt() + 1e-12).all()
    often = ~among & (p > 0.01)
    assert (drawn.var(0)[often] / variance[often] - 1).abs().max() < 0.2


@pytest.mark.parametrize("k", [0, 4])
def test_the_gradient_of_the_forward_kl_is_unbiased(k: int) -> None:
    times = 2000
    z, student = logits(1, dtype=float64), torch.randn(1, V, generator=generator(1), dtype=float64)
    term = ForwardKL()
    wanted = torch.from_numpy(softmax(student) - softmax(z))[0]
    target = sparse_target(z.expand(times, -1), k, 16, generator=generator())
    teacher = Known(target.ids, target.probs, target.tail, 1.0)
    side = teacher.align(Distribution(student.expand(times, -1)))
    gradients = term.with_gradient(side, teacher, torch.zeros(times, dtype=torch.int64))[1]  # type: ignore[arg-type]
    error = gradients.std(0) / times**0.5
    assert ((gradients.mean(0) - wanted).abs() <= 4 * error + 1e-12).all()
    assert error.max() < 0.005


def test_a_kl_on_bins_rises_to_the_true_one_with_k() -> None:
    z, student = logits(dtype=float64), torch.randn(6, V, generator=generator(1), dtype=float64)
    p, q = softmax(z), softmax(student)
    truth = (p * np.log(p / q)).sum(-1)
    found = []
    for k in range(1, V + 1):
        target = sparse_target(z, k, 0)
        teacher = Known(target.ids, target.probs, target.tail, 1.0)
        logp, logq = teacher.logp(), teacher.align(Distribution(student)).logp()
        found.append((logp.exp() * (logp - logq)).sum(-1).numpy())
    assert (np.diff(found, axis=0) >= -1e-12).all()
    assert (found[0] < 0.9 * truth).all()
    np.testing.assert_allclose(found[-1], truth, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_nothing_is_drawn_of_a_rest_without_mass(dtype: torch.dtype) -> None:
    z = torch.full((2, 5), float("-inf"), dtype=dtype)
    z[0, 3], z[1, 1], z[1, 2] = 0.0, 0.0, 0.0
    target = sparse_target(z, 1, 4, generator=generator())
    assert target.ids[0].tolist() == [3, -1]
    assert target.probs[0].tolist() == [1.0, 0.0]
    assert sorted(target.ids[1].tolist()) == [1, 2]
    assert target.probs[1].tolist() == pytest.approx([0.5, 0.5])
    assert target.tail.tolist() == [0.0, 0.0]


def test_draws_depend_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sparse_target(logits(), 3, 20, generator=generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = (sparse_target(logits(), 3, 20, generator=generator(seed)) for seed in (5, 6))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.probs, second.probs)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_no_positions() -> None:
    for k, draws in ((3, 0), (0, 4), (3, 4)):
        target = sparse_target(logits(0), k, draws, generator=generator())
        assert len(target.ids) == len(target.probs) == len(target.tail) == 0


@pytest.mark.parametrize(("k", "draws", "temperature"), [(0, 0, 1.0), (-1, 5, 1.0), (5, -1, 1.0), (5, 0, 0.0)])
def test_what_cannot_be_is_refused(k: int, draws: int, temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"k=|temperature"):
        sparse_target(logits(), k, draws, temperature)
