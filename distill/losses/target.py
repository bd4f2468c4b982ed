"""From what a teacher gives for a batch to what terms see of a block of positions, one chunk at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill.losses.support import Apart, Distribution, Known, Mixture, Side, cut
from distill.types import Outputs, SparseTarget, Target

Block = Callable[[slice], Side]
"""Gives the teacher's side of some positions of a chunk."""

Chunk = Callable[[slice], Block]
"""Projects a chunk of valid positions through the teacher's head, where there is one."""


def chunked(target: Target, valid: Tensor, num_classes: int) -> Chunk:
    """Keep the valid positions of a target.

    Args:
        target: of a batch.
        valid: `[B, T]`, boolean; N are True.
        num_classes: V.
    """
    if isinstance(target, Outputs):
        return partial(_whole, target.features[valid], target, num_classes)
    if isinstance(target, SparseTarget):
        tail = target.tail[valid]
        return partial(_sparse, target.ids[valid], target.probs[valid], tail, target.temperature, not bool(tail.any()))
    parts = [chunked(part, valid, num_classes) for part in target.parts]
    return partial(_mixed, parts, target.weights[valid], num_classes, target.how)


def _whole(features: Tensor, outputs: Outputs, num_classes: int, rows: slice) -> Block:
    with torch.no_grad():
        logits = outputs.head(features[rows])
    return lambda block: Distribution(cut(logits[block], num_classes))


def _sparse(ids: Tensor, probs: Tensor, tail: Tensor, temperature: float, no_tail: bool, rows: slice) -> Block:
    return Known(ids[rows], probs[rows], tail[rows], temperature, no_tail).__getitem__


def _mixed(parts: list[Chunk], weights: Tensor, num_classes: int, how: str, rows: slice) -> Block:
    blocks, weights = [part(rows) for part in parts], weights[rows]

    def side(block: slice) -> Side:
        sides = [each(block) for each in blocks]
        assert not any(isinstance(each, Apart) for each in sides), "a target of several teachers has no such part"
        if how == "apart":
            return Apart(sides, weights[block])  # type: ignore[arg-type]
        return Mixture(sides, weights[block], num_classes, how == "log_probabilities")  # type: ignore[arg-type]

    return side
