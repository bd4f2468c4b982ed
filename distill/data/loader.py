"""The loaders: which rows go into which optimizer step, the same at every split into ranks and micro-batches, and resumable."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets.utils import tqdm as datasets_tqdm
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from distill import signals
from distill.types import IGNORE_INDEX, ConfigError, DataError

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows in an epoch: a function of (seed, epoch) alone, the same on every rank and machine."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


class Loader:
    """Training batches. Optimizer step g of epoch e sees rows `permutation(seed, e)[g·G : (g+1)·G]`.

    `G = world_size · window · batch_size`; micro-batch m of rank r is slice `m · world_size + r` of those rows, so that
    1×8, 8×1 and two ranks train on the same rows in each step. A tail that does not fill a step is dropped.

    Every batch carries `num_valid`, a 0-dim int64: the labels that are not −100 in the whole accumulation window on this
    rank; and `sample_ids` `[B]`, the rows' indices.

    Args:
        rows: a map-style data set of token rows.
        collate: makes a batch of rows.
        batch_size: rows in a micro-batch on one rank.
        window: micro-batches in one optimizer step (`accumulate_grad_batches`).
        rank: of this process.
        world_size: the number of processes.
        seed: of the order.
        num_workers: processes that read ahead; 0 reads in this one.
        limit: where the trainer ends an epoch (`limit_train_batches`): micro-batches, or a fraction as float; None for no limit.
        same_order: give epoch 0's order in every epoch, for overfitting a few batches.

    Raises:
        DataError: the rows do not fill one optimizer step.
        ConfigError: `limit` ends an epoch inside an accumulation window.
    """

    def __init__(
        self,
        rows: Any,
        collate: Collate,
        batch_size: int,
        window: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        limit: int | float | None = None,
        same_order: bool = False,
    ) -> None:
        self.rows, self.collate, self.batch_size, self.window = rows, collate, batch_size, window
        self.rank, self.world_size, self.seed, self.num_workers, self.same_order = rank, world_size, seed, num_workers, same_order
        self.global_batch_size = world_size * window * batch_size
        steps = len(rows) // self.global_batch_size
        if steps == 0:
            raise DataError(
                f"the training data has {len(rows)} rows, but one optimizer step takes {self.global_batch_size} "
                f"({world_size} devices × {window} accumulated × {batch_size} batch_size); "
                "give more data, or lower data.batch_size or trainer.accumulate_grad_batches"
            )
        self._length = steps * window
        self.micro_batches_per_epoch = self._limited(limit)
        self._samples_per_epoch = self.micro_batches_per_epoch * world_size * batch_size
        self._epoch, self._samples = 0, 0
        self.ahead: Callable[[Mapping[str, Tensor]], None] | None = None  # told of each batch one optimizer step early
        self._fresh = True  # the next iteration starts at the position held; it is not a second look at an unfinished epoch

    def __len__(self) -> int:
        """Micro-batches in an epoch on this rank, a multiple of the window."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # a generator, so nothing happens before the first `next`: Lightning calls iter() as a check, and may load the state only after it
        if not self._fresh:
            self._advance(self._samples_per_epoch)
        self._fresh = False
        batches = iter(_reader(_Numbered(self.rows), _Collator(self.collate), self._index_lists(), self.num_workers))
        coming = self._window(batches)
        while window := coming:
            coming = self._window(batches) if self.ahead else []
            num_valid = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in window]).sum()
            for i, batch in enumerate(window, start=1):
                if i == self.window:
                    # counted before the hand-over: Lightning does not come back after the last batch of an epoch
                    self._advance(self._samples + self.global_batch_size)
                yield {**batch, "num_valid": num_valid}
            coming = coming if self.ahead else self._window(batches)

    def _window(self, batches: Iterator[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        window = list(islice(batches, self.window))
        for batch in window if self.ahead else []:
            self.ahead(batch)  # type: ignore[misc]  # it is there
        return window

    def _limited(self, limit: int | float | None) -> int:
        if limit is None or limit == 0:
            return self._length
        stop = min(limit, self._length) if isinstance(limit, int) else int(limit * self._length)
        if stop % self.window:
            raise ConfigError(
                f"trainer.limit_train_batches={limit} ends the epoch after {stop} micro-batches, inside an accumulation window of "
                f"{self.window}; use a multiple of {self.window}"
            )
        return stop

    def _advance(self, samples: int) -> None:
        self._samples = samples
        if samples >= self._samples_per_epoch:
            self._epoch, self._samples, self._fresh = self._epoch + 1, 0, True

    def _index_lists(self) -> list[list[int]]:
        order = permutation(len(self.rows), self.seed, 0 if self.same_order else self._epoch)
        slices = order[self._samples : self._samples_per_epoch].reshape(-1, self.world_size, self.batch_size)
        return slices[:, self.rank].tolist()

    def state_dict(self) -> dict[str, int]:
        """Give the position: the epoch, and the rows of it that all ranks together consumed up to the last completed window."""
        return {"epoch": self._epoch, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration start at a position.

        Raises:
            ConfigError: the position is not the start of an optimizer step of this size.
        """
        if state["samples"] % self.global_batch_size:
            raise ConfigError(
                f"the checkpoint stands at sample {state['samples']} of epoch {state['epoch']}, which is no multiple of the global batch "
                f"of {self.global_batch_size} samples; resume with the batch_size × accumulate_grad_batches × devices it was made with"
            )
        self._epoch, self._samples, self._fresh = state["epoch"], 0, True
        self._advance(state["samples"])


class EvalLoader:
    """Validation or test batches in order: rank r takes batches r, r + world_size, …

    Every rank gets the same number of batches, so that collectives stay in step; a missing one is a copy of the first whose
    labels are all −100.

    Args:
        rows: a map-style data set of token rows.
        collate: makes a batch of rows.
        batch_size: rows in a batch; the last one may have fewer.
        rank: of this process.
        world_size: the number of processes.
        num_workers: processes that read ahead.
    """

    def __init__(self, rows: Any, collate: Collate, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> None:
        starts = range(0, len(rows), batch_size)
        mine = [list(range(i, min(i + batch_size, len(rows)))) for i in starts[rank::world_size]]
        self._length = -(-len(starts) // world_size)
        self._blank = len(mine) < self._length
        first = list(range(min(batch_size, len(rows))))
        self._reader = _reader(rows, collate, [*mine, first] if self._blank else mine, num_workers)

    def __len__(self) -> int:
        """Batches on this rank, the same on every rank."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i, batch in enumerate(self._reader, start=1):
            if self._blank and i == self._length:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            yield batch


class _Numbered(Dataset):
    """Gives each row with its index, and whole batches at once, which Arrow reads faster."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> tuple[int, Mapping[str, Any]]:
        return index, self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Mapping[str, Any]]]:
        return list(zip(indices, self.rows.__getitems__(indices), strict=True))


class _Collator:
    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Tensor]:
        return {**self.collate([row for _, row in numbered]), "sample_ids": torch.tensor([i for i, _ in numbered])}


def _reader(rows: Any, collate: Callable[..., dict[str, Tensor]], index_lists: list[list[int]], num_workers: int) -> DataLoader:
    return DataLoader(
        rows,
        batch_sampler=index_lists,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_in_reader,
        generator=torch.Generator(),  # its own: each new iterator draws a number, and the global state must be that of an uninterrupted run
    )


def _in_reader(worker: int) -> None:
    signals.in_reader(worker)  # else a signal to the job kills the readers, and they the training
    # datasets makes a bar, unseen, for every batch. The bars' own lock is a semaphore that forks share: a reader killed while it holds it,
    # for want of memory, would leave the training waiting for it instead of failing.
    for bar in (tqdm, datasets_tqdm):
        bar.set_lock(threading.RLock())
