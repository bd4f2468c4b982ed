"""How far an export is from the student."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.export.base import Run
from distill.export.served import inputs_of
from distill.types import Batch


@dataclass(frozen=True)
class Gap:
    """What separates two models on the same rows.

    Attributes:
        kl: mean over valid positions of `Σ_v p_v ln(p_v / q_v)`, p the first, in nats.
        agreement: share of positions where both have the same top-1.
        largest: difference of a logit.
        exact: whether every logit is the same to the bit.
    """

    kl: float
    agreement: float
    largest: float
    exact: bool

    def within(self, tolerance: float) -> bool:
        """Whether it is small enough; 0 asks for the same bits. What is not a number never is."""
        return self.exact if tolerance == 0 else math.isfinite(self.largest) and self.kl <= tolerance


@torch.no_grad()
def compare(first: Run, second: Run, batches: Iterable[Batch]) -> Gap:
    """Run two models on the same rows, and on half of a row; padding does not count. Logits of one batch are in memory at a time."""
    count, kl, same, largest, exact = 0, 0.0, 0, 0.0, True
    for batch in with_half_a_row(batches):
        ours, theirs = (_valid(run(batch), batch) for run in (first, second))
        p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        # a class without probability on both sides, −inf − −inf, has no part in the sum
        kl += torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum().item()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        largest = float(torch.maximum(torch.tensor(largest), (ours - theirs).abs().max()))  # keeps a NaN, which `max` may not
        exact = exact and torch.equal(ours, theirs)
        count += len(ours)
    return Gap(kl / count, same / count, largest, exact)


def with_half_a_row(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, and after the first one its first row alone, cut in half: a traced graph may have taken a size for a constant."""
    for i, batch in enumerate(batches):
        yield batch
        if i == 0:
            length = max(1, batch["input_ids"].shape[1] // 2)
            # without the mask: all of it is text
            yield {name: batch[name][:1, :length] for name in ("input_ids", "token_type_ids") if name in batch}


def _valid(logits: Tensor, batch: Batch) -> Tensor:
    """`[N, V]`: the positions that are no padding, or all samples."""
    return logits[inputs_of(batch)["attention_mask"].bool()] if logits.ndim == 3 else logits
