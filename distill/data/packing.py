"""From documents to rows of tokens, as pure functions. Labels are already shifted: `labels[t]` is what position t predicts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.types import IGNORE_INDEX

Row = dict[str, NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that belong together, e.g. an article, or a prompt and its answer.

    Attributes:
        ids: `[n]`, token ids.
        trained: `[n]`, whether the token is one that the student learns to predict.
        route: the number of its teacher, where documents name theirs.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    route: int | None = None

    @property
    def labels(self) -> NDArray[np.int32]:
        """`labels[t] = ids[t + 1]` if that token is trained on, else −100; the last token predicts nothing."""
        labels = np.full_like(self.ids, IGNORE_INDEX)
        labels[:-1] = np.where(self.trained[1:], self.ids[1:], IGNORE_INDEX)
        return labels

    @property
    def columns(self) -> Row:
        """What a row says of each position: its token, its label and, where there is one, its route."""
        columns = {"input_ids": self.ids, "labels": self.labels}
        return columns if self.route is None else {**columns, "route": np.full_like(self.ids, self.route)}


def pack(documents: Iterable[Document], length: int, pad_id: int) -> Iterator[Row]:
    """Concatenate documents and cut blocks of exactly `length` positions; nothing is lost.

    `position_ids` restart at 0 at the start of each document and of each block, which is how attention tells documents
    apart (without an `attention_mask` and without a cache). A document cut by the end of a block goes on in the next one
    as a segment of its own; the last label before the cut is still its next token. The end of the last block is padded
    by a segment whose labels are −100, and that has no route (−1).

    Args:
        documents: in order.
        length: positions in a block.
        pad_id: the token that fills the last block.
    """
    parts: list[Row] = []
    room = length
    for document in documents:
        rest = document.columns
        while len(rest["input_ids"]):
            parts.append({name: values[:room] for name, values in rest.items()})
            rest = {name: values[room:] for name, values in rest.items()}
            room -= len(parts[-1]["input_ids"])
            if room == 0:
                yield _block(parts)
                parts, room = [], length
    if parts:
        yield _block([*parts, {name: np.full(room, _fill(pad_id)[name], np.int32) for name in parts[0]}])


def _block(parts: Sequence[Row]) -> Row:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {**columns, "position_ids": np.concatenate([np.arange(len(part["labels"]), dtype=np.int32) for part in parts])}


def _fill(pad_id: int) -> dict[str, int]:
    return {"input_ids": pad_id, "labels": IGNORE_INDEX, "route": -1}


def pieces(document: Document, length: int) -> Iterator[Row]:
    """Cut one document into rows of at most `length` positions; the last label before a cut is the next piece's first token."""
    columns = document.columns
    for start in range(0, len(document.ids), length):
        yield {name: values[start : start + length] for name, values in columns.items()}


def pad(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them and add `attention_mask`.

    Args:
        rows: one-dimensional columns, of one length within a row; `labels` is padded with −100, `input_ids` with `pad_id`, `route`
            with −1, others with 0.
        pad_id: the padding token.

    Returns:
        `[B, T]` tensors of int64.
    """
    fill = _fill(pad_id)
    padded = {
        key: torch.nn.utils.rnn.pad_sequence([_int64(row[key]) for row in rows], batch_first=True, padding_value=fill.get(key, 0))
        for key in rows[0]
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    padded["attention_mask"] = (torch.arange(padded["input_ids"].shape[1]) < lengths[:, None]).long()
    return padded


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack rows whose columns all have the same length into `[B, T]` tensors of int64."""
    return {key: torch.stack([_int64(row[key]) for row in rows]) for key in rows[0]}


def _int64(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.int64))
