"""A teacher that is a table of logits, made beforehand by whatever model: a class of one's own, named in YAML by its import path."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.types import Batch, ConfigError, Outputs

BelowTop1 = Literal["keep", "shuffle", "hard"]
SURE = 1e4  # a gap in logits that no temperature in use makes less than certain


class LogitTable(Teacher):
    """Looks logits up by the tokens of a text, in training as in validation.

    By tokens, not by row numbers: validation batches carry none, and rows that the data skip or hold out would shift them.

    Args:
        folder: holds `teacher.npz`, with `classes` (the names of the columns) and for each part float logits `[rows, V]`, and for each
            part the texts, `PART.jsonl` with the column `text`, e.g. `train.npy` in the archive and `train.jsonl` beside it.
        max_length: the same as `data.max_length`; texts are cut there.
        below_top1: what becomes of each row of the table: `keep` it; `shuffle` the logits below the largest among their classes, which
            keeps the top-1, its probability and the entropy at every temperature; or `hard`, all probability on the top-1.
        seed: of the shuffle.
    """

    def __init__(self, folder: str, max_length: int, below_top1: BelowTop1 = "keep", seed: int = 0) -> None:
        self.name, self.folder, self.max_length, self.below_top1, self.seed = folder, Path(folder), max_length, below_top1, seed
        self.tokenizer: Any = None
        self.rows: dict[tuple[int, ...], int] = {}  # the tokens of a text to its row
        self.table: Tensor | None = None

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Read the table, once; it stays in float32, whatever the trainer computes in."""
        if self.table is None:
            self.classes, parts = self._read()
            self.parts = list(parts)
            rng = np.random.default_rng(self.seed)
            self.table = torch.cat([torch.from_numpy(below_top1(part, self.below_top1, rng)) for part in parts.values()])
        self.table = self.table.to(device)

    def _read(self) -> tuple[list[str], dict[str, NDArray[np.float32]]]:
        path = self.folder / "teacher.npz"
        if not path.is_file():
            raise ConfigError(f"model.teacher.folder: no file '{path}'; make it first, see scripts/experiments/make_long_tail.py")
        with np.load(path) as file:
            return file["classes"].tolist(), {name: file[name] for name in file if name != "classes"}

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Compare the order of the classes, and cut the texts into the data's tokens; once for the same tokenizer."""
        assert self.table is not None, "setup comes first"
        ours = [expected["id2label"][i] for i in range(expected["num_labels"])]
        if differ := [f"{i}: '{a}' / '{b}'" for i, (a, b) in enumerate(zip(self.classes, ours, strict=False)) if a != b]:
            raise ConfigError(
                f"model.teacher and the data order the classes differently, {differ[0]}; set data.labels to the teacher's order"
            )
        if len(ours) != len(self.classes):
            raise ConfigError(
                f"model.teacher knows {len(self.classes)} classes, but the data have {len(ours)}; take the table of these data"
            )
        if self.tokenizer is not tokenizer:
            self.tokenizer, self.rows = tokenizer, self._index(tokenizer)

    def _index(self, tokenizer: Any) -> dict[tuple[int, ...], int]:
        assert self.table is not None, "setup comes first"
        files = [str(self.folder / f"{part}.jsonl") for part in self.parts]
        texts = [text for file in files for text in datasets.load_dataset("json", data_files=file, split="train")["text"]]
        if len(texts) != len(self.table):
            raise ConfigError(f"model.teacher.folder: {len(texts)} texts in {', '.join(files)}, but {len(self.table)} rows of logits")
        ids = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        # backwards, so that of equal texts the first counts
        return {tuple(ids[i]): i for i in reversed(range(len(ids)))}

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Look up; the logits are the features of an identity head, as of any classifier."""
        assert self.table is not None, "setup comes first"
        lengths = batch["attention_mask"].sum(1).tolist()
        keys = [tuple(ids[:length]) for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        try:
            rows = [self.rows[key] for key in keys]
        except KeyError as error:
            raise ConfigError(
                f"model.teacher has no logits for the text '{self.tokenizer.decode(error.args[0])}'; train and validate on the files in "
                f"{self.folder}, with data.max_length {self.max_length} as model.teacher.max_length says"
            ) from None
        return Outputs(self.table[rows][:, None], nn.Identity())

    def describe(self) -> dict[str, Any]:
        """Count: a table has no parameters."""
        assert self.table is not None, "setup comes first"
        return {"parameters": 0, "trainable": 0, "megabytes": self.table.nbytes / 1e6, "dtype": "float32"}


def below_top1(logits_NV: NDArray[Any], mode: BelowTop1, rng: np.random.Generator) -> NDArray[np.float32]:
    """Keep, shuffle or remove what each row says about the classes other than its first; see `LogitTable`.

    Args:
        logits_NV: `[N, V]`.
        mode: what to do.
        rng: of the shuffle, every row by a permutation of its own.

    Returns:
        `[N, V]`, float32.
    """
    out = np.array(logits_NV, np.float32)
    top = np.arange(out.shape[1]) == out.argmax(1)[:, None]  # of equal ones the first
    if mode == "shuffle":
        out[~top] = rng.permuted(out[~top].reshape(len(out), -1), axis=1).ravel()
    elif mode == "hard":
        out = np.where(top, np.float32(0.0), np.float32(-SURE))
    return out
