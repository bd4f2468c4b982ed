"""From a batch to prompts whose log-probabilities say what a teacher thinks at each position with a label, and back."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distill.types import IGNORE_INDEX, Batch, SparseTarget


class Prompt(NamedTuple):
    """One document of a batch, up to the label of its last position that has one.

    Attributes:
        tokens: n + 1 ids: those of n positions, and the label of the last. What follows position t is the prompt's token t + 1.
        row: of the batch.
        positions: `[M]`, those in the row that have a label.
        entries: `[M]`, the indices of the tokens that follow them.
    """

    tokens: list[int]
    row: int
    positions: NDArray[np.int64]
    entries: NDArray[np.int64]


class Known(NamedTuple):
    """What is known at M positions: K classes, likeliest first, −1 at the end where there are fewer; `Σ_k probs + tail = 1`.

    Attributes:
        ids: `[M, K]`.
        probs: `[M, K]`, float64.
        tail: `[M]`, float64.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]
    tail: NDArray[np.float64]


def prompts(batch: Batch) -> Iterator[Prompt]:
    """Cut a batch into documents, for a server knows of no padding and no packing; those without a label are left out.

    Args:
        batch: `input_ids` and `labels`, `[B, T]`; `attention_mask` tells padding, `position_ids` restart at 0 with each document.
    """
    ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    real = batch["attention_mask"].cpu().numpy() > 0 if "attention_mask" in batch else np.ones(ids.shape, bool)
    starts = batch["position_ids"].cpu().numpy() == 0 if "position_ids" in batch else np.zeros(ids.shape, bool)
    for row in range(len(ids)):
        here = np.flatnonzero(real[row])
        for document in np.split(here, np.flatnonzero(starts[row, here])):
            taught = np.flatnonzero(labels[row, document] != IGNORE_INDEX)
            if len(taught):
                read = document[: taught[-1] + 1]
                tokens = [*ids[row, read].tolist(), int(labels[row, read[-1]])]
                yield Prompt(tokens, row, document[taught], taught + 1)


def requests(all_prompts: Iterable[Prompt], most: int) -> list[list[Prompt]]:
    """Split prompts into requests of at most so many tokens; a longer one goes alone."""
    groups: list[list[Prompt]] = []
    room = 0
    for prompt in all_prompts:
        if not groups or len(prompt.tokens) > room:
            groups.append([])
            room = most
        groups[-1].append(prompt)
        room -= len(prompt.tokens)
    return groups


def target(batch: Batch, sent: Sequence[Prompt], known: Sequence[Known], k: int) -> SparseTarget:
    """Put what is known of each prompt back to its positions; others, which no term looks at, get class 0 and all mass in the tail.

    Args:
        batch: that the prompts are from.
        sent: the prompts.
        known: of each.
        k: K.
    """
    shape = tuple(batch["input_ids"].shape)
    ids, probs, tail = torch.full((*shape, k), -1), torch.zeros(*shape, k), torch.ones(shape)
    ids[..., 0] = 0
    for prompt, found in zip(sent, known, strict=True):
        ids[prompt.row, prompt.positions] = torch.from_numpy(found.ids)
        probs[prompt.row, prompt.positions] = torch.from_numpy(found.probs).float()
        tail[prompt.row, prompt.positions] = torch.from_numpy(found.tail).float()
    device = batch["input_ids"].device
    return SparseTarget(ids.to(device), probs.to(device), tail.to(device))
