"""Truncated decompositions against numpy, and the whitened one against the closed form."""

import numpy as np
import pytest
import torch

from distill.compress.svd import Spectrum, decompose, factors, rank_of_energy, ranks_for_budget, ranks_for_energy


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_cut_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    left, sigma = decompose(weight)
    first, second = factors(weight, left, 2)
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(sigma.numpy(), s, rtol=1e-10)
    np.testing.assert_allclose((second @ first).numpy(), u[:, :2] * s[:2] @ vt[:2], atol=1e-10)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))
    assert first.shape == (2, shape[1])
    assert first.is_contiguous()
    assert second.is_contiguous()


def test_the_full_rank_is_the_weight() -> None:
    weight = matrix(5, 7).float()
    first, second = factors(weight, decompose(weight)[0], 5)
    torch.testing.assert_close(second @ first, weight)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_whitened_cut_leaves_the_tail_of_w_s(shape: tuple[int, int]) -> None:
    """‖(W − B A) X‖² / N is the sum of the squared singular values of W S left out, S Sᵀ = X Xᵀ / N; and no other cut leaves less."""
    weight, x = matrix(*shape), matrix(shape[1], 400, 1) * torch.logspace(0, 2, shape[1], dtype=torch.float64)[:, None]
    moment = x @ x.T / 400
    left, sigma = decompose(weight, moment)
    error = lambda first, second: ((weight - second @ first) @ x).square().sum() / 400
    root = np.linalg.cholesky(moment.numpy())
    tail = np.linalg.svd(weight.numpy() @ root, compute_uv=False)
    np.testing.assert_allclose(sigma.numpy(), tail, rtol=1e-3)
    for rank in (1, 3):
        first, second = factors(weight, left, rank)
        np.testing.assert_allclose(error(first, second).item(), np.square(tail[rank:]).sum(), rtol=1e-3)
        plain = factors(weight, decompose(weight)[0], rank)
        assert error(first, second) < 0.9 * error(*plain)


def test_fewer_inputs_than_their_width() -> None:
    weight, x = matrix(4, 10), matrix(10, 3, 1)
    first, second = factors(weight, decompose(weight, x @ x.T / 3)[0], 3)
    torch.testing.assert_close(second @ first @ x, weight @ x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("energy", "rank"), [(0.01, 1), (0.512, 1), (0.52, 2), (0.8, 2), (0.81, 3), (1.0, 3)])
def test_energy_by_hand(energy: float, rank: int) -> None:
    assert rank_of_energy(torch.tensor([8.0, 6.0, 5.0, 0.0]), energy) == rank  # squares 64, 36, 25, 0: shares 0.512, 0.8, 1, 1


def test_layers_that_would_grow_stay_dense() -> None:
    # 4 × 4 gains below rank 2; flat: 90 % of the energy takes all four directions; steep: one
    spectra = {"flat": Spectrum((4, 4), torch.ones(4)), "steep": Spectrum((4, 4), torch.tensor([10.0, 1.0, 0.1, 0.1]))}
    assert ranks_for_energy(spectra, 0.9) == {"steep": 1}


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [(64, {}), (56, {"a": 2}), (48, {"a": 1}), (36, {"a": 1, "b": 2}), (35, {"a": 1, "b": 1}), (3, {"a": 1, "b": 1})],
)
def test_the_budget_takes_the_highest_energy_that_fits(budget: int, ranks: dict[str, int]) -> None:
    # Dense 32 weights each, 12 at rank 1 and 24 at rank 2. Rank 1 and 2 keep 0.8 and 0.95 of a, 0.5 and 0.75 of b
    a, b = (torch.tensor(energies).sqrt() for energies in ([0.8, 0.15, 0.04, 0.01], [0.5, 0.25, 0.15, 0.1]))
    assert ranks_for_budget({"a": Spectrum((4, 8), a), "b": Spectrum((4, 8), b)}, budget) == ranks
