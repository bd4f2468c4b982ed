"""How much is pruned when, and which weights that leaves: pure functions."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Scope = Literal["global", "layer", "row"]
Kind = Literal["cubic", "one_shot", "iterative"]


def cubic(progress: float, final: float, initial: float = 0.0) -> float:
    """`s_f + (s_0 − s_f)(1 − p)³`: much in the beginning, when there is much to spare; Zhu & Gupta 2017, arXiv 1710.01878.

    Args:
        progress: p = (t − t₀) / (n Δt), in [0, 1].
        final: s_f, in [0, 1).
        initial: s_0.

    Returns:
        s_t, the share of zeros.
    """
    return final + (initial - final) * (1 - progress) ** 3


def iterative(turn: int, turns: int, final: float) -> float:
    """`1 − (1 − s_f)^(i / n)`: every turn prunes the same share of what is left; Han et al. 2015, arXiv 1506.02626.

    Args:
        turn: i, from 1.
        turns: n.
        final: s_f, in [0, 1).

    Returns:
        The share of zeros after this turn.
    """
    return float(1 - (1 - final) ** (turn / turns))


def sparsity_at(
    step: int, first: int, last: int, final: float, kind: Kind = "cubic", every: int = 1, turns: int = 5, after: bool = False
) -> float | None:
    """Say what share is to be zero from a step on, or None where nothing is due.

    `cubic` is due at first, first + every, … and at last; `one_shot` at first alone; `iterative` at `turns` steps from first on, the
    distance between them (last − first) / turns, so that each is followed by as many steps of finetuning.

    Args:
        step: optimizer steps done.
        first: where pruning begins, t₀.
        last: where the final sparsity is reached, at least `first`.
        final: share of zeros in the end, in [0, 1).
        kind: of the schedule.
        every: optimizer steps between two masks, Δt.
        turns: of `iterative`.
        after: whether masks are also due once the final sparsity is reached, as for scores that are learned.
    """
    end = first if kind == "one_shot" else last
    if step < first or (step > end and not (after and (step - end) % every == 0)):
        return None
    if step > end or (step == end and kind != "iterative"):
        return final
    if kind == "cubic":
        return cubic((step - first) / (last - first), final) if (step - first) % every == 0 else None
    starts = [first + turn * (last - first) // turns for turn in range(turns)]
    turn = sum(start <= step for start in starts)
    return iterative(turn, turns, final) if step in starts or (after and (step - first) % every == 0) else None


def kept_of(count: int, sparsity: float) -> int:
    """How many of so many stay, at least one: `count − round(sparsity · count)`."""
    return max(1, count - round(sparsity * count))


def largest(scores_RN: Tensor, kept: int) -> Tensor:
    """Mark the largest scores of every row, exactly so many; of equal ones the first, so that every rank and device marks the same.

    Args:
        scores_RN: `[R, N]`.
        kept: from 1 to N.

    Returns:
        `[R, N]`, bool.
    """
    limit = _ascending(scores_RN, scores_RN.shape[1] - kept)
    reached = scores_RN >= limit
    if bool((reached.sum(1, dtype=torch.int32) == kept).all()):
        return reached
    above, equal = scores_RN > limit, scores_RN == limit
    free = kept - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= free))


def _ascending(scores_RN: Tensor, index: int) -> Tensor:
    """The score at this place of each row in ascending order, `[R, 1]`; NumPy is several times as fast as torch on a CPU."""
    if scores_RN.device.type != "cpu":
        return scores_RN.kthvalue(index + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(scores_RN.numpy(), index, axis=1)[:, index, None])


def masks(scores: Sequence[Tensor], sparsity: float, scope: Scope) -> list[Tensor]:
    """Mark the weights that stay: the largest scores of all matrices together, of each, or of each row.

    Args:
        scores: of each weight, `[out, in]`.
        sparsity: share of zeros, in [0, 1), the same of every matrix or row where these are compared within.
        scope: what is compared.

    Returns:
        For each weight `[out, in]`, bool, True where it stays.
    """
    if scope == "row":
        return [largest(score, kept_of(score.shape[1], sparsity)) for score in scores]
    if scope == "layer":
        return [largest(score.reshape(1, -1), kept_of(score.numel(), sparsity)).view_as(score) for score in scores]
    together = torch.cat([score.flatten() for score in scores])[None]
    parts = largest(together, kept_of(together.numel(), sparsity))[0].split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]
