"""How much each weight matters, by the methods of the literature: pure functions, the larger the more worth keeping."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """`|w|`; Han et al. 2015, arXiv 1506.02626.

    Args:
        weight: `[out, in]`.

    Returns:
        `[out, in]`, float32.
    """
    return weight.detach().float().abs()


def movement(score: Tensor, weight: Tensor, gradient: Tensor, lr: float = 1.0) -> Tensor:
    """Let a score grow where gradient descent moves the weight away from 0: `S ← S − lr · w · ∂L/∂w′`; Sanh et al. 2020, arXiv 2005.07683.

    `w′ = w · m` is the masked weight, so its gradient is also there where the mask is 0, and a weight may come back. In training an
    optimizer does this: `w · ∂L/∂w′` is the gradient of S that `mask.MovementMask` gives it.

    Args:
        score: S, `[out, in]`, 0 in the beginning.
        weight: w, `[out, in]`.
        gradient: ∂L/∂w′, `[out, in]`.
        lr: step.

    Returns:
        The next S, `[out, in]`.
    """
    return score - lr * weight * gradient


def displacement(weight: Tensor, initial: Tensor) -> Tensor:
    """`|w − w₀|`, how far training has carried a weight from where it began; "movement" in another sense than `movement`.

    The criterion `movement` of Zhou et al. 2019, arXiv 1905.01067, is its like for weights trained from their initialisation.

    Args:
        weight: w, `[out, in]`.
        initial: w₀, `[out, in]`; rounded to the weight's dtype, which DeepSpeed's bfloat16 makes coarser than what it began as.

    Returns:
        `[out, in]`, float32.
    """
    return (weight.detach().float() - initial.to(weight.dtype).float()).abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """`|w_ij| · ‖x_j‖₂`, to be compared within each row i; Sun et al. 2023, arXiv 2306.11695.

    Args:
        weight: `[out, in]`.
        norms: `[in]`, the norm of each input feature over all positions of a calibration batch.

    Returns:
        `[out, in]`, float32.
    """
    return magnitude(weight) * norms.float()


def random(shape: torch.Size, seed: int) -> Tensor:
    """Uniform numbers of [0, 1): what any method must beat. The same at each call, so that masks of growing sparsity are nested.

    Args:
        shape: of the weight.
        seed: of its own generator, on the CPU, so that every rank and device draws the same.

    Returns:
        Of this shape, float32, on the CPU.
    """
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def soft_mask(score: Tensor, threshold: float) -> Tensor:
    """`σ(S) > τ`: how many weights stay is left to training; soft movement pruning, Sanh et al. 2020, arXiv 2005.07683, section 4.

    Args:
        score: S, `[out, in]`.
        threshold: τ, in (0, 1).

    Returns:
        `[out, in]`, bool.
    """
    return score.sigmoid() > threshold


def soft_penalty_gradient(score: Tensor, strength: float, count: int) -> Tensor:
    """The gradient of `λ · mean σ(S)`, which draws all scores down: `λ σ(S)(1 − σ(S)) / n`; of the same paper.

    Args:
        score: S of one matrix, of any shape.
        strength: λ ≥ 0.
        count: n, the scores of all matrices together, which the mean is of.

    Returns:
        ∂/∂S, of the same shape.
    """
    share = score.sigmoid()
    return strength / count * share * (1 - share)
