"""Between rows of a store and a padded batch: how a row is found, and where its positions lie."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.teachers.store import StoredRow, row_key
from distill.types import IGNORE_INDEX, Batch, SparseTarget


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of a batch have something, on the CPU.

    Attributes:
        keys: each row's name, by its content without its padding.
        valid: `[B, T]`, or `[B, 1]` with one label a row: which positions have a label.
        real: `[B, T]`, which positions are no padding.
    """

    keys: list[bytes]
    valid: NDArray[np.bool_]
    real: NDArray[np.bool_]


def places(batch: Batch) -> Places:
    """Look at a batch; waits for the device that it is on."""
    ids, valid = batch["input_ids"].numpy(force=True), batch["labels"].numpy(force=True) != IGNORE_INDEX
    starts = batch["position_ids"].numpy(force=True) if "position_ids" in batch else None
    real = batch["attention_mask"].numpy(force=True) != 0 if "attention_mask" in batch else np.ones(ids.shape, np.bool_)
    routes = batch["route"].numpy(force=True) if "route" in batch else None
    labelled = real if valid.shape == real.shape else np.ones(valid.shape, np.bool_)  # with one label a row, that place
    keys = [
        row_key(
            ids[i, at],
            None if starts is None else starts[i, at],
            valid[i, labelled[i]],
            None if routes is None else routes[i, labelled[i]],
        )
        for i, at in enumerate(real)
    ]
    return Places(keys, valid, real)


@dataclass(frozen=True, slots=True)
class Padded:
    """The targets of a batch on the CPU, as those of `SparseTarget`."""

    ids: Tensor
    probs: Tensor
    tail: Tensor
    hidden: dict[str, Tensor]

    def pinned(self) -> "Padded":
        """Put into memory that a GPU can read while it works."""
        hidden = {name: value.pin_memory() for name, value in self.hidden.items()}
        return replace(self, ids=self.ids.pin_memory(), probs=self.probs.pin_memory(), tail=self.tail.pin_memory(), hidden=hidden)

    def on(self, device: torch.device, temperature: float, taps: Iterable[str]) -> SparseTarget:
        """Move to where the batch is; from pinned memory without waiting."""
        hidden = {name: self.hidden[name].to(device, non_blocking=True) for name in taps}
        ids, probs, tail = (part.to(device, non_blocking=True) for part in (self.ids, self.probs, self.tail))
        return SparseTarget(ids, probs, tail, temperature, hidden)


def padded(rows: Sequence[StoredRow], where: Places) -> Padded:
    """Lay rows into a batch, K being the most classes that any position of it has."""
    width = max([int((row.ids >= 0).sum(-1).max()) for row in rows if len(row.ids)], default=1)
    ids = np.full((*where.valid.shape, width), -1, np.int64)
    ids[..., 0] = 0  # the first is a class where there is no label, too
    probs, tail = np.zeros(ids.shape, np.float32), np.ones(where.valid.shape, np.float32)
    hidden = {name: np.zeros((*where.real.shape, value.shape[-1]), np.float32) for name, value in rows[0].hidden.items()}
    for i, row in enumerate(rows):
        at, k = where.valid[i], min(width, row.ids.shape[1])
        ids[i, at, :k], probs[i, at, :k], tail[i, at] = row.ids[:, :k], row.probs[:, :k], row.tail
        for name, value in row.hidden.items():
            hidden[name][i, where.real[i]] = value
    tensors = {name: torch.from_numpy(value) for name, value in hidden.items()}
    return Padded(torch.from_numpy(ids), torch.from_numpy(probs), torch.from_numpy(tail), tensors)
