"""How far an export is from the student."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.export.base import Run
from distill.report.costs.served import inputs_of
from distill.types import Batch

# of the constant's KL: a squared error of half the variance, for small differences of logits
SHARE = 0.5
# nats that are nothing, also where the student is itself near a constant on these rows
NOTHING = 1e-4


@dataclass(frozen=True)
class Gap:
    """What separates two models on the same rows.

    Attributes:
        kl: mean over valid positions of `Σ_v p_v ln(p_v / q_v)`, p the first, in nats.
        agreement: share of positions where both have the same top-1.
        largest: difference of a logit.
        exact: whether every logit is the same to the bit.
        constant: the KL of the best model that does not look at its input, which gives the mean p̄ of p everywhere:
            `H(p̄) − mean H(p)`, in nats. Any other constant, equal logits among them, is further away.
    """

    kl: float
    agreement: float
    largest: float
    exact: bool
    constant: float

    def within(self, tolerance: float) -> bool:
        """Whether it is small enough: `kl ≤ limit(tolerance)`; 0 asks for the same bits. What is not a number never is."""
        return self.exact if tolerance == 0 else math.isfinite(self.largest) and self.kl <= self.limit(tolerance)

    def limit(self, tolerance: float) -> float:
        """The largest KL that passes, `min(tolerance, max(½ constant, 1e-4))` nats.

        A tolerance alone would let pass what knows nothing: of two classes and a mean confidence of 0.8, equal logits are 0.25 nats away.
        """
        return min(tolerance, max(SHARE * self.constant, NOTHING))


@torch.no_grad()
def compare(first: Run, second: Run, batches: Iterable[Batch]) -> Gap:
    """Run two models on the same rows, and on half of a row; padding does not count. Logits of one batch are in memory at a time."""
    count, kl, same, largest, exact = 0, 0.0, 0, 0.0, True
    entropy, total = 0.0, torch.zeros(())
    for batch in with_half_a_row(batches):
        ours, theirs = (_valid(run(batch), batch) for run in (first, second))
        p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        # a class without probability on both sides, −inf − −inf, has no part in the sum
        kl += torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum().item()
        entropy, total = entropy + torch.special.entr(p.exp()).sum().item(), total + p.exp().sum(0)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        largest = float(torch.maximum(torch.tensor(largest), (ours - theirs).abs().max()))  # keeps a NaN, which `max` may not
        exact = exact and torch.equal(ours, theirs)
        count += len(ours)
    constant = float(torch.special.entr(total / count).sum()) - entropy / count
    return Gap(kl / count, same / count, largest, exact, max(0.0, constant))


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
