"""What many do with the likeliest classes: drop the rest of the mass and make the others sum to 1. A control, not a method."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from distill.teachers.cached import CachedTeacher
from distill.types import Batch, SparseTarget


class Renormalised(CachedTeacher):
    """`p_k / Σ_j p_j` on the K likeliest classes of a store and nothing on all others, against the student's softmax over every class."""

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> SparseTarget:
        """Drop the tail."""
        target = super().__call__(batch, taps)
        return replace(target, probs=target.probs / target.probs.sum(-1, keepdim=True), tail=torch.zeros_like(target.tail))
