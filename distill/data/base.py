"""What a data module is: rows of tokens for training, validation and test, and the loaders over them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import datasets
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.data import digest, profile, resume
from distill.data.loader import Collate, EvalLoader, Loader
from distill.tasks import Task
from distill.types import ConfigError, DataError


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: datasets.Dataset
    val: datasets.Dataset | None
    test: datasets.Dataset | None


class DistillData(pl.LightningDataModule, ABC):
    """Token rows for one task. The constructor only takes names; `setup` reads, once.

    Args:
        batch_size: rows in a micro-batch on one device.
        val_batch_size: the same for validation and test; None for `batch_size`.
        seed: of the order of the training rows.
        num_workers: processes per device that read ahead; 0 reads in the main process.

    Attributes:
        tokenizer: of transformers, after `setup`.
        num_classes: `num_tokens`, or labels.
        max_length: positions that a row has at most.
        pack: whether a row holds several documents, which must not see each other.
        train_set: token rows; `labels[t]` is the class that position t predicts, or −100.
        val_set: the same, or None where there is no validation.
        test_set: the same, or None.
        skipped: how many rows were left out, by reason.
        routes: what the numbers of the column `route` stand for, where rows name their teacher.

    Raises:
        ConfigError: a number is out of range.
    """

    task: ClassVar[type[Task]]
    tokenizer: PreTrainedTokenizerBase
    num_classes: int
    max_length: int
    pack: bool = False
    train_set: datasets.Dataset
    val_set: datasets.Dataset | None
    test_set: datasets.Dataset | None

    def __init__(self, batch_size: int = 8, val_batch_size: int | None = None, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        for key, value, least in (("batch_size", batch_size, 1), ("val_batch_size", val_batch_size, 1), ("num_workers", num_workers, 0)):
            if value is not None and value < least:
                raise ConfigError(f"data.{key} must be at least {least}, got {value}")
        self.batch_size, self.val_batch_size, self.seed, self.num_workers = batch_size, val_batch_size or batch_size, seed, num_workers
        self.skipped: dict[str, int] = {}
        self.routes: list[str] = []
        self._ready = False
        self._class_counts: Tensor | None = None
        self.ahead: Callable[[Mapping[str, Tensor]], None] | None = None  # see Loader.ahead
        self._loader: Loader | None = None
        self._position: dict[str, int] = {}

    @abstractmethod
    def read(self) -> Splits:
        """Read everything: set `tokenizer` and `num_classes`, count `skipped`, and give the token rows."""

    @abstractmethod
    def collator(self) -> Collate:
        """Give the function that makes a batch of rows; it must be picklable, and is asked for after `setup`."""

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """Give what the Hugging Face config of a new student must say about this data."""

    @abstractmethod
    def example(self) -> list[tuple[str, bool]]:
        """Decode the first training row token by token, each with whether it is trained on."""

    @property
    def pad_id(self) -> int:
        """The padding token; a tokenizer without one pads with its eos, which no label and no valid position ever sees."""
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def num_tokens(self) -> int:
        """The highest token id and one; `len(tokenizer)` is smaller where the ids have a gap."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def prepare_data(self) -> None:
        """Read on one process per machine, before `setup` on all, so that the others find the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read the data, the first time; start a new fit at the first epoch.

        Args:
            stage: Lightning's; None to read only.

        Raises:
            DataError: a file, row or column is not what the configuration says, or there are no rows for the stage.
        """
        if stage == "fit":
            self._loader, self._position = None, {}
        if not self._ready:
            self._read()
        if stage == "validate" and self.val_set is None:
            raise DataError("no validation data; set data.val_data, or data.val_fraction above 0")
        if stage == "test" and self.test_set is None:
            raise DataError("no test data; set data.test_data")

    def _read(self) -> None:
        splits = self.read()
        for name, rows in splits._asdict().items():
            if rows is not None and len(rows) == 0:
                raise DataError(f"no row of the {name} data can be used; skipped: {self._skipped() or 'none'}")
            setattr(self, f"{name}_set", rows and rows.with_format("numpy"))
        self._ready = True
        if self.skipped:
            rank_zero_info(f"data: skipped {self._skipped()}")

    def train_dataloader(self) -> Loader:
        """Give the training batches; the accumulation window and the ranks are the trainer's.

        Raises:
            DataError: the rows do not fill one optimizer step.
        """
        loader = self._new_loader()
        loader.ahead = self.ahead
        # Lightning asks again in the middle of a fit where reload_dataloaders_every_n_epochs is set
        position = self._loader.state_dict() if self._loader else self._position
        if position:
            loader.load_state_dict(position)
        self._loader = loader
        return loader

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Give the validation batches in order, or an empty list where there are none."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> EvalLoader | list[Any]:
        """Give the test batches in order, or an empty list where there are none."""
        return self._eval_loader(self.test_set)

    def state_dict(self) -> dict[str, int]:
        """Give the position in the training data.

        Lightning saves the loader's own state too, but does not load it at the start of an epoch, nor where the module asks for
        `estimated_stepping_batches`; the data module's state is always loaded.
        """
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue at a position; strategies differ in whether they ask for the loader before or after."""
        self._position = dict(state_dict)
        if self._loader is not None:
            self._loader.load_state_dict(self._position)

    def realign(self, checkpoint: dict[str, Any]) -> None:
        """Move Lightning's count of micro-batches in a checkpoint to where this data resumes; see `resume.realign`.

        To be called by the module's `on_load_checkpoint`, when `setup` was called already.
        """
        position = checkpoint.get(type(self).__qualname__)
        if not position or self.trainer is None:
            return
        if position["samples"] == 0 and resume.at_end_of_epoch(checkpoint):
            epoch = self._new_loader()
            resume.realign(checkpoint, epoch.micro_batches_per_epoch)
        else:
            resume.realign(checkpoint, position["samples"] // (self.batch_size * self.trainer.world_size))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training rows' content: the same for the same tokens in any process."""
        return digest.of_rows(self.train_set)

    def class_counts(self) -> Tensor:
        """Count how often each class is a label of the training rows, `[num_classes]`, the first time it is asked for; after `setup`.

        Raises:
            DataError: a label is none of the classes.
        """
        if self._class_counts is None:
            self._class_counts = torch.from_numpy(profile.class_counts(self.train_set, self.num_classes, self.fingerprint))
        return self._class_counts

    def class_name(self, index: int) -> str:
        """Give a class a name for messages: a classifier's label, or the text of the token."""
        names = self.model_config().get("id2label")
        return str(names[index] if names else self.tokenizer.decode([index]))

    def summary(self) -> dict[str, str]:
        """Describe the data for a person, in a few lines."""
        sizes = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        lines = {
            "rows": " · ".join(f"{name} {len(rows):,}" for name, rows in sizes.items() if rows is not None),
            "valid positions": f"{digest.valid_positions(self.train_set):,}",
            "classes": f"{self.num_classes:,}",
            "fingerprint": self.fingerprint,
        }
        lines |= {"teachers named": ", ".join(self.routes)} if self.routes else {}
        return {**lines, "skipped": self._skipped()} if self.skipped else lines

    def _new_loader(self) -> Loader:
        window, limit, same_order = 1, None, False
        if self.trainer is not None:
            window = self.trainer.accumulate_grad_batches
            same_order = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # set by a function of Lightning, unseen by mypy
            limit = None if self.trainer.fast_dev_run else self.trainer.limit_train_batches  # type: ignore[attr-defined]
        return Loader(
            self.train_set, self.collator(), self.batch_size, window, *self._rank(), self.seed, self.num_workers, limit, same_order
        )

    def _skipped(self) -> str:
        return ", ".join(f"{count:,} × {reason}" for reason, count in self.skipped.items())

    def _eval_loader(self, rows: datasets.Dataset | None) -> EvalLoader | list[Any]:
        return [] if rows is None else EvalLoader(rows, self.collator(), self.val_batch_size, *self._rank(), self.num_workers)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
