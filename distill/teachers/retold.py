"""A batch told again in the tokens of another tokenizer, and where both tell the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.spans import Alignment, Stream, align
from distill.teachers.spelling import Spelling, spelling
from distill.types import IGNORE_INDEX, Batch

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Document:
    """The student's tokens of one document, without special tokens at its ends.

    Attributes:
        ids: `[n]`, int64.
        at: `[n]`, the flattened position that predicts each; −1 for the first of a document.
        usable: `[n]`, whether it is text, and the label of the position that predicts it.
        row: that it stands in.
    """

    ids: Ints
    at: Ints
    usable: NDArray[np.bool_]
    row: int


@dataclass(frozen=True, slots=True)
class Retold:
    """What the teacher is given, and how it lies to what the student has.

    Attributes:
        inputs: `input_ids [B, T']`, and `attention_mask` or, where the student's rows are packed, `position_ids`.
        alignment: where both meet.
        labels: valid positions of the student.
        special: how many of them predict a special token.
        changed: how many predict a token whose bytes the teacher's tokens do not spell.
    """

    inputs: dict[str, Tensor]
    alignment: Alignment
    labels: int
    special: int
    changed: int

    @property
    def lost(self) -> int:
        """Valid positions before text that take no part."""
        return self.labels - self.special - len(self.alignment.student_at)

    def summary(self) -> str:
        """Say what takes part, and why not the rest."""
        ours, theirs = len(self.alignment.student_at), len(self.alignment.teacher_at)
        spans = int(self.alignment.student_span[-1]) + 1 if ours else 0
        return (
            f"across tokenizers, in the first batch: {ours:,} of {self.labels:,} valid positions are compared, in {spans:,} spans of text, "
            f"with {theirs:,} of the teacher; left out are {self.special:,} before special tokens, {self.changed:,} before text that the "
            f"teacher's tokenizer does not keep or has no position for, {self.lost - self.changed:,} in spans with a prompt's token, a "
            "special one, or a document's first"
        )


class Reteller:
    """Recovers the bytes of the student's documents from their tokens, and encodes them with the teacher's tokenizer.

    Documents are told apart by `position_ids` that restart, or by `attention_mask`. Special tokens at their ends are left away; inside
    (marks of a chat) they are written out, and become special again where the teacher's tokenizer knows them too. What is no UTF-8 (a
    character cut by the end of a row) is not told. Where the teacher's tokenizer changes the text, the rest of the document takes no part.

    Args:
        student: the bytes of its tokens.
        tokenizer: the teacher's, of transformers; its settings for truncation and padding are taken away.
        longest: tokens that the teacher takes; None for any number.
    """

    def __init__(self, student: Spelling, tokenizer: Any, longest: int | None = None) -> None:
        self.student, self.teacher, self.longest = student, spelling(tokenizer, "model.teacher.tokenizer"), longest
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.before = [] if self.teacher.bos is None else [self.teacher.bos]

    def __call__(self, batch: Batch) -> Retold:
        """Tell a batch again.

        Args:
            batch: on the CPU.
        """
        documents, special = student_documents(batch, self.student)
        texts = [readable(self.student.of(document.ids.tolist())) for document in documents]
        told = self._encode([text for _, text in texts])
        inputs, places = lay_out(told, [document.row for document in documents], batch, self.teacher.pad)
        ours, theirs, closes = [_NONE], [_NONE], []
        usable, base = 0, 0
        for document, (skipped, text), ids, place in zip(documents, texts, told, places, strict=True):
            ends, agreed = self._spelled(ids, text)
            lengths = self.student.lengths[document.ids]
            close = base + int(lengths.sum()) + 1
            ours.append(_ours(document, lengths, skipped, agreed, base, close))
            theirs.append(self._theirs(ids, ends, place, agreed, base, close))
            closes.append(close)
            usable, base = usable + int(document.usable.sum()), close + 1
        student, teacher, ends = joined(ours), joined(theirs), np.array(closes, np.int64)
        changed = usable - int((student.usable & ~np.isin(student.ends, ends)).sum())
        return Retold(inputs, align(student, teacher, ends), int((batch["labels"] != IGNORE_INDEX).sum()), special, changed)

    def _encode(self, texts: Sequence[bytes]) -> list[list[int]]:
        # a tokenizer that puts a space before a text puts the one that is there, and would make it two
        given = [text[1:] if self.teacher.leads and text[:1] == b" " and text[1:2] != b" " else text for text in texts]
        encodings = self.backend.encode_batch_fast([text.decode() for text in given], add_special_tokens=False)
        return [[*self.before, *encoding.ids][: self.longest] for encoding in encodings]

    def _spelled(self, ids: list[int], text: bytes) -> tuple[Ints, int]:
        """Where each of the teacher's tokens ends in the text, and how many bytes of the text they spell as they are."""
        own = ids[len(self.before) :]
        spelled = self.teacher.of(own)
        ends, agreed = np.cumsum(self.teacher.lengths[own]), common(spelled, text)
        if spelled != text and spelled[:1] == b" " and agreed <= (without := common(spelled[1:], text)):
            return (ends - 1).clip(min=0), without  # the first is the space that it puts before a text
        return ends, agreed

    def _theirs(self, ids: list[int], ends: Ints, place: int, agreed: int, base: int, close: int) -> Stream:
        first = len(self.before)
        own = np.array(ids[first:], np.int64)
        at = place + np.arange(first - 1, len(ids) - 1)
        usable = ~self.teacher.special[own]
        usable[: 1 - first] = False  # without bos nothing predicts the first
        return Stream(np.where(ends > agreed, close, base + ends), at, own, usable)


def _ours(document: Document, lengths: Ints, skipped: int, agreed: int, base: int, close: int) -> Stream:
    ends = np.cumsum(lengths) - skipped
    told = ends > 0
    usable = document.usable & (ends >= lengths)  # not with bytes of a character that was cut
    ends = np.where(ends > agreed, close, base + ends)
    return Stream(ends[told], document.at[told], document.ids[told], usable[told])


_EMPTY = np.zeros(0, np.int64)
_NONE = Stream(_EMPTY, _EMPTY, _EMPTY, np.zeros(0, np.bool_))


def joined(streams: Sequence[Stream]) -> Stream:
    """Put the streams of several documents one after the other."""
    return Stream(*(np.concatenate([getattr(stream, name) for stream in streams]) for name in ("ends", "at", "ids", "usable")))


def student_documents(batch: Batch, student: Spelling) -> tuple[list[Document], int]:
    """Find the documents that have a label which is text, and count the labels that are special tokens.

    The token that the last position of a cut document predicts is in its label alone; it belongs to the text all the same.
    """
    ids, labels = (batch[name].numpy().reshape(-1) for name in ("input_ids", "labels"))
    length = batch["input_ids"].shape[1]
    here = np.flatnonzero(batch["attention_mask"].numpy()) if "attention_mask" in batch else np.arange(len(ids))
    first = here % length == 0 if "position_ids" not in batch else batch["position_ids"].numpy().reshape(-1) == 0
    if "attention_mask" in batch:
        first = np.diff(here // length, prepend=-1) > 0
    documents, special = [], 0
    for where in np.split(here, np.flatnonzero(first)[1:]):
        tokens, at = ids[where], np.concatenate([[-1], where[:-1]])
        if labels[where[-1]] != IGNORE_INDEX:
            tokens, at = np.append(tokens, labels[where[-1]]), np.append(at, where[-1])
        learnt = (at >= 0) & (labels[at] == tokens)
        text = ~student.special[tokens]
        special += int((learnt & ~text).sum())
        if (learnt & text).any():
            inner = np.flatnonzero(text)
            keep = slice(inner[0], inner[-1] + 1)
            documents.append(Document(tokens[keep], at[keep], (learnt & text)[keep], int(where[0]) // length))
    return documents, special


def readable(raw: bytes) -> tuple[int, bytes]:
    """Leave out the end of a cut character at the start, and everything from the first byte on that is no UTF-8.

    Returns:
        How many bytes were left out at the start, and the rest.
    """
    skipped = next((i for i, byte in enumerate(raw[:3]) if byte & 0xC0 != 0x80), min(3, len(raw)))
    try:
        raw[skipped:].decode()
    except UnicodeDecodeError as error:
        return skipped, raw[skipped : skipped + error.start]
    return skipped, raw[skipped:]


def common(a: bytes, b: bytes) -> int:
    """How many bytes two texts share from their start."""
    if a == b:
        return len(a)
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return int(differ[0]) if len(differ) else n


def lay_out(documents: Sequence[list[int]], rows: Sequence[int], batch: Batch, pad: int) -> tuple[dict[str, Tensor], list[int]]:
    """Put documents where the student has them: one to a row and padded, or one after the other where its rows are packed.

    Args:
        documents: the tokens of each.
        rows: the row of each, not decreasing.
        batch: the student's.
        pad: the padding token.

    Returns:
        A batch, and the flattened position of each document's first token.
    """
    ids: list[list[int]] = [[] for _ in batch["input_ids"]]
    positions: list[list[int]] = [[] for _ in ids]
    columns = []
    for document, row in zip(documents, rows, strict=True):
        columns.append(len(ids[row]))
        ids[row] += document
        positions[row] += range(len(document))
    width = max(1, *map(len, ids))
    inputs = {"input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids])}
    if "position_ids" in batch:
        inputs["position_ids"] = torch.tensor([[*row, *range(width - len(row))] for row in positions])
    else:  # a row without a document shows its first padding token, for attention over nothing is NaN
        inputs["attention_mask"] = torch.tensor([[1] * max(1, len(row)) + [0] * (width - max(1, len(row))) for row in ids])
    return inputs, [row * width + column for row, column in zip(rows, columns, strict=True)]
