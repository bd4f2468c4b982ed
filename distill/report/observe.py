"""One pass over held-out rows for all models side by side: figures per position, and nothing of size `[N, V]`."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from distill.losses.chunked import block_size, chunk_size, chunks
from distill.losses.support import Apart, Distribution, Mixture, Side
from distill.losses.target import chunked
from distill.report.columns import Pen
from distill.report.evidence import TEACHER, Ints, Observed, Subject
from distill.types import IGNORE_INDEX, Batch, DataError

SAMPLE = 4096
ELEMENTS = 2**22
"""Logits that are looked at more closely, of each model; a large vocabulary has fewer positions in the sample, at least 512."""


@torch.no_grad()
def observe(
    subjects: Mapping[str, Subject], batches: Iterable[Batch], num_classes: int, device: torch.device, of_rows: int, seed: int = 0
) -> Observed:
    """Ask every model about every batch once, and keep what it says of each valid position.

    A teacher whose target is several apart, `Σ_m w_m L(p_m, q)`, is seen as their mean, `Σ_m w_m p_m`; where every position has one of
    them that is the same.

    Args:
        subjects: the models by name, the teacher as `TEACHER`; its target knows all classes.
        batches: of held-out rows, in order, on any device.
        num_classes: V; what a head has beyond is padding, and left out.
        device: where the models are.
        of_rows: how many held-out rows there are.
        seed: of the sample.

    Returns:
        What they said. `top_k` is 5, and at most a quarter of the classes; one class where there are fewer than 8, and the overlap is
        then the agreement.

    Raises:
        DataError: no position of the batches has a label.
    """
    batches = list(batches)
    labels, rows = _positions(batches)
    if not len(labels):
        raise DataError(f"none of the {of_rows:,} held-out rows has a label that could be looked at; check data.val_data")
    sample, top_k = spread(len(labels), sample_size(num_classes), seed), min(5, max(1, num_classes // 4))
    pens = {name: Pen(labels, sample, num_classes, top_k, TEACHER in subjects and name != TEACHER) for name in subjects}
    start = 0
    with _evaluating(subjects.values()):
        for batch in tqdm(batches, desc=f"Asking {len(subjects)} models", unit="batch", disable=None):
            start += _ask(subjects, pens, {name: value.to(device) for name, value in batch.items()}, num_classes, start)
    assert start == len(labels), "every position was asked about"
    columns = {name: pen.columns() for name, pen in pens.items()}
    return Observed(labels, rows, sample, columns, top_k, num_classes, of_rows, _tokens(batches))


def sample_size(num_classes: int) -> int:
    """How many positions are looked at more closely, at most."""
    return min(SAMPLE, max(512, ELEMENTS // num_classes))


def spread(n: int, size: int, seed: int) -> Ints:
    """Draw up to `size` of n positions, one from each of as many stretches of equal length; in order."""
    size = min(n, size)
    edges = np.arange(size + 1, dtype=np.int64) * n // max(1, size)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def _positions(batches: Sequence[Batch]) -> tuple[Ints, Ints]:
    """The label and the row of each valid position."""
    labels, rows, start = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for batch in batches:
        found = batch["labels"].cpu().numpy()
        valid = found != IGNORE_INDEX
        labels.append(found[valid])
        rows.append(start + valid.nonzero()[0])
        start += len(found)
    return np.concatenate(labels), np.concatenate(rows)


def _tokens(batches: Sequence[Batch]) -> bytes:
    """Hash the tokens row by row, without what pads them to the longest of their batch."""
    found = hashlib.blake2b(digest_size=16)
    for batch in batches:
        ids = batch.get("input_ids", batch["labels"]).cpu()
        mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
        for row, real in zip(ids, mask, strict=True):
            found.update(np.ascontiguousarray(row[real].numpy(), "<i8").tobytes() + b"|")
    return found.digest()


@contextmanager
def _evaluating(subjects: Iterable[Subject]) -> Iterator[None]:
    """Keep the models from dropping out."""
    training = [m for each in subjects if each.model is not None for m in each.model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ask(subjects: Mapping[str, Subject], pens: Mapping[str, Pen], batch: Batch, num_classes: int, start: int) -> int:
    """Write down what all models say of a batch whose first position is the `start`th; give how many positions it has."""
    valid = batch["labels"] != IGNORE_INDEX
    targets = {name: chunked(subject.target(batch), valid, num_classes) for name, subject in subjects.items()}
    count, others = int(valid.sum()), [name for name in subjects if name != TEACHER]
    for rows in chunks(count, chunk_size(num_classes, valid.device)):
        parts = {name: target(rows) for name, target in targets.items()}
        place = start + rows.start
        for block in chunks(rows.stop - rows.start, block_size(num_classes, valid.device)):
            here = slice(place + block.start, place + block.stop)
            teacher = pens[TEACHER].write(here, _whole(parts[TEACHER](block), num_classes), None) if TEACHER in parts else None
            for name in others:
                pens[name].write(here, _whole(parts[name](block), num_classes), teacher)
        here = slice(place, start + rows.stop)
        ranks = pens[TEACHER].look_closer(here, None) if TEACHER in parts else None
        for name in others:
            pens[name].look_closer(here, ranks)
    return count


def _whole(side: Side, num_classes: int) -> Distribution:
    if isinstance(side, Apart):
        return Mixture(side.parts, side.weights, num_classes, geometric=False)
    assert isinstance(side, Distribution), "a target of all classes is wanted"
    return side
