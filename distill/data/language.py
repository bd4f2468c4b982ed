"""Data for language models: documents become rows of tokens, packed into full windows or padded."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill import hub
from distill.data import digest, files, packing, routes
from distill.data.base import DistillData, Splits
from distill.data.loader import Collate
from distill.data.packing import Document
from distill.tasks import CausalLM
from distill.types import IGNORE_INDEX, ConfigError, DataError

Encoder = Callable[[Mapping[str, Sequence[Any]]], list[Document]]
"""Makes documents of a batch of rows (column -> values). Picklable, and a function of its fields alone: results are cached by them."""


class LanguageData(DistillData, ABC):
    """Rows of tokens for a causal language model.

    Args:
        max_length: positions in a row, at least 2.
        pack: whether to concatenate documents and cut full windows (no padding; documents do not see each other), or to give each
            document its own row, padded to the longest of its batch.
        **common: see `DistillData`.

    Raises:
        ConfigError: `max_length` is too small to predict anything.
    """

    task = CausalLM

    def __init__(self, max_length: int = 1024, pack: bool = True, **common: Any) -> None:
        super().__init__(**common)
        if max_length < 2:
            raise ConfigError(f"data.max_length must be at least 2 (a token, and one to predict), got {max_length}")
        self.max_length, self.pack = max_length, pack

    def collator(self) -> Collate:
        """Stack packed rows, pad others."""
        return packing.stack if self.pack else functools.partial(packing.pad, pad_id=self.pad_id)

    def model_config(self) -> dict[str, Any]:
        """Give the vocabulary's size and the special tokens."""
        return {
            "vocab_size": self.num_tokens,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.pad_id,
        }

    def example(self) -> list[tuple[str, bool]]:
        """Decode the first training row; a token is trained on if it is the label of the position before it."""
        row = self.train_set[0]
        trained = [False, *(row["labels"][:-1] != IGNORE_INDEX).tolist()]
        return [(self.tokenizer.decode([token]), is_label) for token, is_label in zip(row["input_ids"].tolist(), trained, strict=True)]

    def token_rows(
        self, documents: Callable[[], Iterable[Document]], key: str, cut: bool = True, cache_dir: Path | None = None
    ) -> datasets.Dataset:
        """Make rows of documents and keep them on disk.

        Args:
            documents: gives the documents; not called where the rows are on disk already.
            key: a hash of everything that the documents depend on.
            cut: whether a document longer than a row goes on in the next, where rows are not packed.
            cache_dir: a folder; None for that of datasets.
        """
        columns = ["input_ids", "labels", *(["position_ids"] if self.pack else []), *([routes.ROUTE] if self.routes else [])]
        code = Path(packing.__file__).read_bytes() + Path(__file__).read_bytes()
        with files.progress(False):
            return datasets.Dataset.from_generator(
                functools.partial(self._rows, documents, cut),
                features=datasets.Features({name: datasets.List(datasets.Value("int32")) for name in columns}),
                cache_dir=cache_dir and str(cache_dir),
                fingerprint=digest.of(key, self.max_length, self.pack, self.pad_id, cut, code),
            )

    def _rows(self, documents: Callable[[], Iterable[Document]], cut: bool) -> Iterator[packing.Row]:
        if self.pack:
            yield from packing.pack(documents(), self.max_length, self.pad_id)
            return
        for document in documents():
            for row in packing.pieces(document, self.max_length):
                if (row["labels"] != IGNORE_INDEX).any():
                    yield row
                if not cut:
                    break


class LanguageFiles(LanguageData, ABC):
    """Documents from files or the hub, encoded row by row.

    Args:
        train_data: a file (.txt, .json, .jsonl, .csv, .tsv, .parquet), or `org/name`, `org/name:split`, `org/name:config:split` on the hub.
        val_data: the same for validation; None to hold out `val_fraction` of the training rows.
        val_fraction: share of the rows to hold out, by a hash of their content; 0 for no validation.
        test_data: the same for the test, or None.
        tokenizer: a folder or a hub id.
        revision: of data and tokenizer on the hub; None for the newest.
        route_column: the column that names each row's teacher, for the teacher `Routed`; None where one teaches all.
        **common: see `LanguageData` and `DistillData`.
    """

    cut_long: ClassVar[bool] = True  # whether an unpacked document longer than a row goes on in the next row

    def __init__(
        self,
        train_data: str,
        tokenizer: str,
        val_data: str | None = None,
        val_fraction: float = 0.05,
        test_data: str | None = None,
        revision: str | None = None,
        route_column: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.route_column = route_column
        self.train_data, self.val_data, self.test_data = train_data, val_data, test_data
        self.tokenizer_name, self.val_fraction, self.revision = tokenizer, val_fraction, revision

    @property
    @abstractmethod
    def columns(self) -> dict[str, bool]:
        """The arguments that name the columns to read, each with whether it must be text."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """Give the function that makes documents of rows; asked for when `tokenizer` is there."""

    def read(self) -> Splits:
        """Load the tokenizer, read the files, encode them.

        Raises:
            ConfigError: the tokenizer has no end-of-sequence token.
            DataError: something is wrong with a file, or no row of it can be used.
        """
        self.tokenizer = hub.load(AutoTokenizer, self.tokenizer_name, "data.tokenizer", revision=self.revision or "main")
        self.num_classes = self.num_tokens
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                f"data.tokenizer: '{self.tokenizer_name}' has no eos token, so documents have no end; set eos_token in its folder"
            )
        train = self._read_columns(self.train_data, "data.train_data")
        if self.val_data is None:
            train, val = files.hold_out(train, self.val_fraction, self.train_data)
        else:
            val = self._read_columns(self.val_data, "data.val_data")
        test = self.test_data and self._read_columns(self.test_data, "data.test_data")
        self.routes = routes.of(self.route_column, train, val, test or None)
        return Splits(
            self._encode(train, self.train_data),
            val and self._encode(val, self.val_data or self.train_data),
            test and self._encode(test, str(self.test_data)),
        )

    def _read_columns(self, source: str, key: str) -> datasets.Dataset:
        columns = {argument: getattr(self, argument) for argument in (*self.columns, "route_column")}
        rows = files.need_columns(files.read(source, key, self.revision), source, columns)
        for argument, is_text in self.columns.items():
            if is_text:
                files.need_text(rows, source, columns[argument])
        return routes.named(rows, source, self.route_column) if self.route_column is not None else rows

    def _encode(self, rows: datasets.Dataset, source: str) -> datasets.Dataset:
        encode = _Encode(self.encoder(), self.max_length)
        code = Path(inspect.getfile(type(encode.encoder))).read_bytes() + Path(__file__).read_bytes()
        by_row: Callable[..., dict[str, list[Any]]] = encode
        features = _ENCODED
        if self.route_column is not None:
            by_row = routes.WithRoute(encode, self.route_column, tuple(self.routes))
            features = datasets.Features({**_ENCODED, routes.ROUTE: datasets.List(datasets.Value("int32"))})
        key = digest.of(rows._fingerprint, Hasher.hash(by_row), code)
        with files.progress(False):
            encoded = rows.map(
                by_row, batched=True, with_indices=True, remove_columns=rows.column_names, new_fingerprint=key, features=features
            )
        skipped = Counter(reason for reason in encoded["skip"] if reason)
        if skipped.total() == len(rows):
            raise DataError(f"no row of '{source}' can be used: {', '.join(f'{n} × {reason}' for reason, n in skipped.items())}")
        for reason, count in skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        return self.token_rows(functools.partial(_documents, encoded), key, self.cut_long)


_ENCODED = datasets.Features(
    {"ids": datasets.List(datasets.Value("int32")), "trained": datasets.List(datasets.Value("bool")), "skip": datasets.Value("string")}
)


@dataclass(frozen=True)
class _Encode:
    """A map over batches of rows: the documents, and why a row was left out (then its document is empty)."""

    encoder: Encoder
    max_length: int

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        documents = self.encoder(batch)
        reasons = [_why_skip(document, self.max_length) for document in documents]
        keep = [(d, "") if not reason else (_EMPTY, reason) for d, reason in zip(documents, reasons, strict=True)]
        return {"ids": [d.ids for d, _ in keep], "trained": [d.trained for d, _ in keep], "skip": [reason for _, reason in keep]}


_EMPTY = Document(np.zeros(0, np.int32), np.zeros(0, np.bool_))


def _why_skip(document: Document, max_length: int) -> str:
    positions = np.flatnonzero(document.labels != IGNORE_INDEX)
    if not len(positions):
        return "nothing to train on"
    return "" if positions[0] < max_length else f"the prompt fills all of max_length={max_length}"


def _documents(encoded: datasets.Dataset) -> Iterator[Document]:
    for batch in encoded.with_format("numpy").iter(batch_size=1000):
        numbers = [int(number) for (number,) in batch[routes.ROUTE]] if routes.ROUTE in batch else [None] * len(batch["ids"])
        for ids, trained, number in zip(batch["ids"], batch["trained"], numbers, strict=True):
            yield Document(ids.astype(np.int32), trained.astype(np.bool_), number)


def bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the beginning-of-sequence token as a list, if the tokenizer adds one by itself."""
    empty = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id] else []
