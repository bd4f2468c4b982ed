"""Speculative decoding: how often the teacher accepts a token that the student drafts, and how much faster decoding becomes."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST = 32  # tokens drafted at a time, of which the best number is looked for


def acceptance(probs_NV: Tensor, teacher_probs_NV: Tensor) -> Tensor:
    """How often a drafted token is accepted, `β = Σ_v min(p_v, q_v)`, one minus the total variation distance.

    Args:
        probs_NV: `[N, V]`, q, the draft's (the student's).
        teacher_probs_NV: `[N, V]`, p, those of the model that checks it.

    Returns:
        `[N]`, in [0, 1]; its mean is the acceptance rate α.

    Reference:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, Theorem 3.5 and
        Corollary 3.6.
    """
    return probs_NV.minimum(teacher_probs_NV).sum(-1)


def tokens_per_call(alpha: ArrayLike, gamma: ArrayLike) -> Floats:
    """Tokens that one call of the teacher gives on average, `Σ_{i=0}^γ α^i = (1 − α^{γ+1}) / (1 − α)`.

    Every position is taken to accept with the same probability, whatever came before; see `tokens_along_text` where that is not so.

    Args:
        alpha: the acceptance rate, in [0, 1].
        gamma: tokens drafted at a time, ≥ 0.

    Returns:
        From 1 to γ + 1, in the shape of both together.

    Reference:
        Leviathan et al. 2023, equation (1).
    """
    alpha, gamma = np.broadcast_arrays(np.asarray(alpha, np.float64), np.asarray(gamma, np.float64))
    some = alpha < 1
    return np.where(some, (1 - alpha ** (gamma + 1)) / np.where(some, 1 - alpha, 1.0), gamma + 1)


def speed_up(alpha: ArrayLike, gamma: ArrayLike, cost: float) -> Floats:
    """How many times as fast as the teacher alone, `(1 − α^{γ+1}) / ((1 − α)(γ c + 1))`.

    Args:
        alpha: the acceptance rate, in [0, 1].
        gamma: tokens drafted at a time, ≥ 0; with 0 nothing is drafted, and the speed-up is 1.
        cost: c, the time of one run of the student over that of one run of the teacher; that of checking γ + 1 tokens at once is taken to
            be that of one.

    Reference:
        Leviathan et al. 2023, Theorem 3.8.
    """
    return per_call(tokens_per_call(alpha, gamma), gamma, cost)


def per_call(tokens: ArrayLike, gamma: ArrayLike, cost: float) -> Floats:
    """The speed-up of so many tokens a call of the teacher, `tokens / (γ c + 1)`."""
    found: Floats = np.asarray(tokens, np.float64) / (np.asarray(gamma, np.float64) * cost + 1)
    return found


def best_gamma(alpha: float, cost: float, most: int = MOST) -> int:
    """How many tokens to draft at a time for the largest speed-up; 0 where drafting does not pay (α ≤ c), at most `most`."""
    return int(np.argmax(speed_up(alpha, np.arange(most + 1), cost)))


def tokens_along_text(betas: Floats, rows: Ints, most: int) -> Floats:
    """Tokens that one call of the teacher gives where positions differ, `mean_t Σ_{i=0}^γ Π_{j=1}^i β_{t+j−1}`, for γ = 0 to `most`.

    Positions that are hard come together, so that this is not what their mean gives. The text is followed, where decoding would follow
    what was accepted. Means are over the positions t that have `most` − 1 more after them in their row.

    Args:
        betas: `[N]`, how often each position accepts, see `acceptance`.
        rows: `[N]`, which row each belongs to; those of a row stand together, in order.
        most: largest γ.

    Returns:
        `[most + 1]`; NaN beyond 1 where no row is long enough.
    """
    starts = np.flatnonzero(rows[: len(rows) - most + 1] == rows[most - 1 :]) if 0 < most <= len(rows) else np.empty(0, np.int64)
    if not len(starts):
        return np.concatenate([[1.0], np.full(most, np.nan)])
    windows: Any = np.lib.stride_tricks.sliding_window_view(betas, most)[starts]
    return np.concatenate([[1.0], 1 + np.cumprod(windows, axis=1).mean(axis=0).cumsum()])
