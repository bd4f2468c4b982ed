"""Some rows of a batch, and targets of all rows put together from those of some."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from distill.types import Batch, Outputs, SparseTarget


def some_rows(batch: Batch, rows: slice | Tensor) -> Batch:
    """Keep these rows of every tensor that has one entry a row."""
    count = len(batch["input_ids"])
    return {name: value[rows] if value.ndim and len(value) == count else value for name, value in batch.items()}


def in_parts(run: Callable[[Batch, Iterable[str]], Outputs], batch: Batch, taps: Iterable[str], size: int) -> Outputs:
    """Run a model on `size` rows at a time; the outputs are those of all rows at once, but for rounding."""
    taps = list(taps)
    parts = [run(some_rows(batch, slice(start, start + size)), taps) for start in range(0, len(batch["input_ids"]), size)]
    if len(parts) == 1:
        return parts[0]
    seen = {name: torch.cat([part.taps[name] for part in parts]) for name in parts[0].taps}
    return Outputs(torch.cat([part.features for part in parts]), parts[0].head, seen)


def spread_rows(target: Outputs | SparseTarget, rows: Tensor, count: int) -> Outputs | SparseTarget:
    """Give a target of `count` rows that says of `rows` what the given one does, and something finite of the others."""
    if len(rows) == count:
        return target
    if isinstance(target, Outputs):
        return Outputs(_placed(target.features, rows, count, 0), target.head)
    ids, probs = _placed(target.ids, rows, count, -1), _placed(target.probs, rows, count, 0)
    others = torch.ones(count, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
    ids[others, :, 0], probs[others, :, 0] = 0, 1.0  # a distribution, of one class
    return SparseTarget(ids, probs, _placed(target.tail, rows, count, 0), target.temperature)


def _placed(values: Tensor, rows: Tensor, count: int, fill: int) -> Tensor:
    return values.new_full((count, *values.shape[1:]), fill).index_copy_(0, rows, values)
