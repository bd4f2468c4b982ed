"""Truncated singular value decomposition of weights: plain, and weighed by what the weights meet.

A linear layer `y = W x` with W `[out, in]` becomes `y = B (A x)` with A `[r, in]` and B `[out, r]`: `r (in + out)` parameters instead of
`in · out`, and as many multiplications a token.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """What decides the rank of one layer.

    Attributes:
        shape: `(out, in)` of the weight.
        sigma: `[min(out, in)]`, singular values, falling.
    """

    shape: tuple[int, int]
    sigma: Tensor

    def parameters(self, rank: int | None) -> int:
        """Count the weights of the layer at a rank; None is the dense layer."""
        out, into = self.shape
        return out * into if rank is None else rank * (out + into)

    def pays(self, rank: int) -> bool:
        """Whether two factors of this rank have fewer weights than the dense layer: `r < in · out / (in + out)`."""
        return self.parameters(rank) < self.parameters(None)


def decompose(weight: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give the left singular vectors U and the singular values Σ of W, or of `W S` with `S Sᵀ = E[x xᵀ]`.

    The second is the decomposition of SVD-LLM (Wang et al. 2024, arXiv 2403.07378): cut at r, it has the least `E ‖(W − W_r) x‖²` of
    all matrices of rank r, namely the sum of the `σ_i²` left out. ASVD (Yuan et al. 2023, arXiv 2312.05821) scales by a diagonal instead.

    Args:
        weight: W, `[out, in]`.
        moment: `[in, in]`, the mean of `x xᵀ` over the inputs; None for the identity.

    Returns:
        U `[out, k]` and Σ `[k]`, k = min(out, in), in float64.
    """
    matrix = weight.detach().double()
    if moment is not None:
        matrix = matrix @ _root(moment.double())
    left, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, sigma


def factors(weight: Tensor, left: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Cut a decomposition: `A = U_rᵀ W` and `B = U_r`, each singular direction's length shared evenly between both.

    `U_r U_rᵀ W` is `U_r Σ_r V_rᵀ`, and in the whitened case `U_r Σ_r V_rᵀ S⁻¹`, without an inverse. Factors of equal length train at
    equal speed.

    Args:
        weight: W, `[out, in]`.
        left: U of `decompose`.
        rank: r, at most the columns of U.

    Returns:
        A `[r, in]` and B `[out, r]`, in the dtype of the weight, row by row in memory: DeepSpeed broadcasts no other weights.
    """
    left = left[:, :rank]
    first = left.T @ weight.detach().double()
    length = first.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
    return (first / length).to(weight.dtype).contiguous(), (left * length.T).to(weight.dtype).contiguous()


def rank_of_energy(sigma: Tensor, energy: float) -> int:
    """Give the smallest r with `Σ_{i ≤ r} σ_i² ≥ energy · Σ σ_i²`.

    Args:
        sigma: `[k]`, falling.
        energy: in (0, 1].
    """
    shares = sigma.double().square().cumsum(0)
    return min(int((shares < energy * shares[-1]).sum()) + 1, len(sigma))


def ranks_for_energy(spectra: Mapping[str, Spectrum], energy: float) -> dict[str, int]:
    """Give each layer the rank that keeps a share of its energy; a layer that would not become smaller is left out."""
    ranks = {name: rank_of_energy(spectrum.sigma, energy) for name, spectrum in spectra.items()}
    return {name: rank for name, rank in ranks.items() if spectra[name].pays(rank)}


def ranks_for_budget(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """Give the ranks of the highest energy share, one for all layers, with which they have at most `budget` weights.

    Args:
        spectra: of the layers, by name.
        budget: weights of all of them together.

    Returns:
        Ranks by name, without the layers that stay dense; of rank 1 each, the least there is, where the budget is smaller still.
    """
    if sum(spectrum.parameters(None) for spectrum in spectra.values()) <= budget:
        return {}
    low, high = 0.0, 1.0
    for _ in range(52):  # to the last bit of a float64
        middle = (low + high) / 2
        if _size(spectra, ranks_for_energy(spectra, middle)) <= budget:
            low = middle
        else:
            high = middle
    return ranks_for_energy(spectra, low)


def _size(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> int:
    return sum(spectrum.parameters(ranks.get(name)) for name, spectrum in spectra.items())


def _root(moment: Tensor) -> Tensor:
    """A lower triangular S with `S Sᵀ` = moment; fewer inputs than its width leave it singular, so a millionth of its mean is added."""
    damped = moment + 1e-6 * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny) * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    return torch.linalg.cholesky(damped)
