"""Texts with one label each."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill import hub
from distill.data import files, packing, routes
from distill.data.base import DistillData, Splits
from distill.data.loader import Collate
from distill.tasks import SequenceClassification
from distill.types import ConfigError, DataError


class ClassificationData(DistillData):
    """Texts with one label each, cut to `max_length` tokens and padded to the longest of their batch.

    Args:
        train_data: a file (.json, .jsonl, .csv, .tsv, .parquet), or `org/name`, `org/name:split`, `org/name:config:split` on the hub.
        tokenizer: a folder or a hub id.
        val_data: the same for validation; None to hold out `val_fraction` of the training rows.
        val_fraction: share of the rows to hold out, by a hash of their content; 0 for no validation.
        test_data: the same for the test, or None.
        text: the column of the text.
        label: the column of the label, text or a whole number.
        labels: the classes in order; None for those of the training data, sorted (as numbers, where all are numbers). A label of the
            data is one of these names or, where no name is a number, its index in this list.
        header: names of the columns of a CSV or TSV file that has no header row.
        max_length: tokens of a text that are kept.
        revision: of data and tokenizer on the hub; None for the newest.
        route_column: the column that names each row's teacher, for the teacher `Routed`; None where one teaches all.
        **common: see `DistillData`.
    """

    task = SequenceClassification

    def __init__(
        self,
        train_data: str,
        tokenizer: str,
        val_data: str | None = None,
        val_fraction: float = 0.05,
        test_data: str | None = None,
        text: str = "text",
        label: str = "label",
        labels: list[str] | None = None,
        header: list[str] | None = None,
        max_length: int = 128,
        revision: str | None = None,
        route_column: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if max_length < 2:
            raise ConfigError(f"data.max_length must be at least 2, got {max_length}")
        self.train_data, self.val_data, self.test_data, self.val_fraction = train_data, val_data, test_data, val_fraction
        self.tokenizer_name, self.revision, self.max_length = tokenizer, revision, max_length
        self.text, self.label, self.labels, self.header, self.route_column = text, label, labels, header, route_column

    def read(self) -> Splits:
        """Load the tokenizer, read the files, find the classes, encode.

        Raises:
            ConfigError: the tokenizer can pad with nothing.
            DataError: something is wrong with a file, or a label is none of the classes.
        """
        self.tokenizer = hub.load(AutoTokenizer, self.tokenizer_name, "data.tokenizer", revision=self.revision or "main")
        if self.tokenizer.pad_token_id is None and self.tokenizer.eos_token_id is None:
            raise ConfigError(f"data.tokenizer: '{self.tokenizer_name}' has neither a pad nor an eos token; set pad_token in its folder")
        whole = self._read_columns(self.train_data, "data.train_data")
        self.classes = self.labels or _classes(whole[self.label])
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise DataError(f"'{self.train_data}' has only the label {self.classes}; a classifier needs at least two")
        self._check_labels(whole, self.train_data)
        if self.val_data is None:
            train, val = files.hold_out(whole, self.val_fraction, self.train_data)
        else:
            train, val = whole, self._read_checked(self.val_data, "data.val_data")
        test = self._read_checked(self.test_data, "data.test_data") if self.test_data else None
        self.routes = routes.of(self.route_column, whole, val, test)
        return Splits(self._encode(train), val and self._encode(val), test and self._encode(test))

    def collator(self) -> Collate:
        """Pad the tokens; `labels` is `[B, 1]`, and `route` too."""
        return functools.partial(_collate, pad_id=self.pad_id)

    def model_config(self) -> dict[str, Any]:
        """Give the classes, the vocabulary's size and the padding token."""
        return {
            "num_labels": self.num_classes,
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: i for i, name in enumerate(self.classes)},
            "vocab_size": self.num_tokens,
            "pad_token_id": self.pad_id,
        }

    def example(self) -> list[tuple[str, bool]]:
        """Decode the first training row; what is trained on is the label, which comes last."""
        row = self.train_set[0]
        tokens = [(self.tokenizer.decode([token]), False) for token in row["input_ids"].tolist()]
        return [*tokens, (f" → {self.classes[int(row['labels'][0])]}", True)]

    def _read_columns(self, source: str, key: str) -> datasets.Dataset:
        columns = {"text": self.text, "label": self.label, "route_column": self.route_column}
        rows = files.need_columns(files.read(source, key, self.revision, self.header), source, columns)
        files.need_text(rows, source, self.text)
        rows = routes.named(rows, source, self.route_column) if self.route_column is not None else rows
        feature = rows.features[self.label]
        values = rows.with_format(None)[self.label]
        # the hub's class labels are numbers with names
        known = feature.names if isinstance(feature, datasets.ClassLabel) else None
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str | int):
                raise DataError(
                    f"'{source}' row {number}: '{self.label}' must be text or a whole number, but is {type(value).__name__} ({value!r:.60})"
                )
            if known is not None and value not in range(len(known)):
                raise DataError(
                    f"'{source}' row {number}: '{self.label}' is {value}, but must be from 0 to {len(known) - 1}; "
                    "-1 stands for a hidden label, so take a split that has its labels"
                )
        names = [str(value) if known is None else known[value] for value in values]
        return rows.remove_columns(self.label).add_column(self.label, self._named(names))

    def _named(self, labels: list[str]) -> list[str]:
        # where a name is itself a number, a number cannot be told from an index
        if not self.labels or any(_is_number(name) for name in self.labels):
            return labels
        by_index = {str(i): name for i, name in enumerate(self.labels)}
        return [by_index.get(label, label) for label in labels]

    def _read_checked(self, source: str, key: str) -> datasets.Dataset:
        rows = self._read_columns(source, key)
        self._check_labels(rows, source)
        return rows

    def _check_labels(self, rows: datasets.Dataset, source: str) -> None:
        known = set(self.classes)
        for number, value in enumerate(rows[self.label], start=1):
            if value not in known:
                shown = ", ".join(self.classes[:10]) + (", …" if len(self.classes) > 10 else "")
                raise DataError(
                    f"'{source}' row {number}: the label '{value}' is none of the {self.num_classes} classes ({shown}); "
                    "mend the row, or list all classes in data.labels"
                )

    def _encode(self, rows: datasets.Dataset) -> datasets.Dataset:
        encode: Callable[..., dict[str, list[Any]]] = _Encode(self.tokenizer, self.text, self.label, tuple(self.classes), self.max_length)
        if self.route_column is not None:
            encode = routes.WithRoute(encode, self.route_column, tuple(self.routes))
        with files.progress(False):
            encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
            kept = encoded.filter(_has_tokens, input_columns="input_ids")
        if lost := len(encoded) - len(kept):
            self.skipped["empty text"] = self.skipped.get("empty text", 0) + lost
        return kept


def _has_tokens(ids: Sequence[int]) -> bool:
    return len(ids) > 0


def _classes(labels: Sequence[str]) -> list[str]:
    distinct = Counter(labels)
    return sorted(distinct, key=int) if all(map(_is_number, distinct)) else sorted(distinct)


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


@dataclass(frozen=True)
class _Encode:
    tokenizer: PreTrainedTokenizerBase
    text: str
    label: str
    classes: tuple[str, ...]
    max_length: int

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        # truncated with the special tokens kept at the end, where an encoder expects them
        encoded = self.tokenizer(list(batch[self.text]), truncation=True, max_length=self.max_length, return_attention_mask=False)
        index = {name: i for i, name in enumerate(self.classes)}
        return {**encoded, "labels": [[index[name]] for name in batch[self.label]]}


def _collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    labels = packing.stack([{"labels": row["labels"]} for row in rows])
    return packing.pad([{key: value for key, value in row.items() if key != "labels"} for row in rows], pad_id) | labels
