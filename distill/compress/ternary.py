"""Weights of three values: BitNet b1.58's absmean quantisation, with a straight-through estimator."""

from typing import Any

import torch
from torch import Tensor


def absmean(weight: Tensor, group_size: int | None = None, eps: float = 1e-5) -> Tensor:
    """The scale `γ = max(mean |w|, ε)` of a weight or of each group in a row, the mean over the weights that are not exactly 0.

    Those that are were pruned, or are ternary already; with them γ would shrink by their share, and no ternary weight be its own.

    Args:
        weight: `[out, in]`.
        group_size: weights of a row that share a scale; None for one scale of the whole weight.
        eps: the smallest scale.

    Returns:
        `[1, 1]`, or `[out, in / group_size]`.
    """
    groups = weight.abs().reshape(1, 1, -1) if group_size is None else weight.abs().unflatten(1, (-1, group_size))
    return (groups.sum(-1) / groups.count_nonzero(-1).clamp(min=1)).clamp(min=eps)


def ternary(weight: Tensor, group_size: int | None = None, eps: float = 1e-5) -> Tensor:
    """Round to `γ · clip(round(w / γ), −1, 1)` with γ of `absmean`; the gradient passes straight through, `∂q/∂w = 1` everywhere.

    Ma et al. 2024, "The Era of 1-bit LLMs", https://arxiv.org/abs/2402.17764, eq. 1–3. As published, neither the clipping nor γ shows in
    the gradient, so that a weight beyond ±1.5 γ can come back.

    The estimate is biased. For w ~ N(0, σ²), measured on 10⁶ draws (and by integration): `E[q(w) − w] = 0.000 σ`, but magnitudes shrink:
    `E|q(w)| − E|w| = −0.248 σ`, which is −31 %; the slope `E[q(w) w] / E[w²]` is 0.588, and the error `E[(q(w) − w)²]` is 0.263 σ². Weights
    below γ / 2 (0.40 σ, 31 % of them) become 0.

    Args:
        weight: `[out, in]`.
        group_size: as of `absmean`.
        eps: as of `absmean`.

    Returns:
        `[out, in]`, of the weight's dtype; every value is −γ, 0 or γ.
    """
    rounded: Tensor = _StraightThrough.apply(weight, group_size, eps)
    return rounded


class _StraightThrough(torch.autograd.Function):
    # not `w + (q − w).detach()`: that sum rounds, and the values would not be −γ, 0 and γ to the bit

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int | None, eps: float) -> Tensor:
        scale = absmean(weight, group_size, eps)
        blocks = weight.reshape(*scale.shape, -1) if group_size else weight.reshape(1, 1, -1)
        levels = (blocks / scale[..., None]).round().clamp(-1, 1)
        return (levels * scale[..., None]).view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
