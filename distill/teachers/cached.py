"""The cached teacher: targets that `cache` wrote once, read from a store on disk. No model of the teacher is in memory."""

import hashlib
import json
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distill.checks import check_classes
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.online import OnlineTeacher
from distill.teachers.padded import Padded, Places, padded, places
from distill.teachers.shape import without_weights
from distill.teachers.store import Store, StoredRow, finished, finished_shards, read_header
from distill.teachers.store.header import HEADER
from distill.types import Batch, ConfigError, DataError, SparseTarget, Support

READERS = 2  # threads: to decode a batch takes less than to train on it


class CachedTeacher(Teacher):
    """Gives what another teacher said of the training rows when `python train.py cache` asked it.

    Args:
        store: folder of the store.
        k: likeliest classes kept, 0 for none.
        draws: random draws kept, 0 for none, see `sparse.sparse_target`.
        temperature: T > 0 of the softmax that they are taken from.
        bits: of a probability.
        seed: of the draws.
        source: the teacher that `cache` asks; training compares its name alone. None where the store is all there is.

    Raises:
        ConfigError: nothing would be kept, or a number is out of range.
    """

    def __init__(
        self,
        store: str,
        k: int = 0,
        draws: int = 64,
        temperature: float = 1.0,
        bits: Literal[8, 16, 32] = 8,
        seed: int = 0,
        source: Teacher | None = None,
    ) -> None:
        if k < 0 or draws < 0 or k + draws == 0:
            raise ConfigError(f"model.teacher: nothing would be kept with k={k} and draws={draws}; take e.g. k=50, or draws=64")
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"model.teacher.temperature must be > 0, got {temperature:g}; use 1.0 for none")
        self.folder, self.k, self.draws, self.bits, self.seed, self.source = Path(store), k, draws, bits, seed, source
        self.T = temperature
        self.store: Store | None = None
        self.shape: nn.Module | None = None
        self.fingerprint = "one that was not looked at"
        self._coming: deque[tuple[list[bytes], Future[Padded]]] = deque()

    @property
    def name(self) -> str:  # type: ignore[override]  # the folder may change
        """The teacher that was asked, and the store."""
        return f"the store {self.folder}" if self.source is None else f"{self.source.name}, from the store {self.folder}"

    def keep_in(self, folder: str) -> None:
        """Take another folder for the store."""
        self.folder = Path(folder)

    def recipe_needed(self) -> None:
        """Give None, for no recipe makes a store; asked before anything is trained, so what is missing is said here.

        Raises:
            ConfigError: the store is not there, or not finished.
        """
        if not (self.folder / HEADER).exists():
            raise ConfigError(f"model.teacher.store: there is no store '{self.folder}'; write it first with `{command()}`")
        if finished(self.folder) is None:
            have, want = len(finished_shards(self.folder)), read_header(self.folder).num_shards
            raise ConfigError(
                f"model.teacher.store: '{self.folder}' is not finished, it has {have} of {want} shards; go on with `{command()}`"
            )

    def wanted(self) -> dict[str, Any]:
        """What the configuration says of the store, as fields of its header."""
        fields: dict[str, Any] = {"temperature": self.T, "k": self.k, "draws": self.draws, "bits": self.bits}
        if self.source is not None:
            fields |= {"teacher": self.source.name, "revision": revision(self.source)}
        return fields

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Open the store."""
        self.device = device
        if self.store is not None:
            return
        self.recipe_needed()
        header = read_header(self.folder)
        header.refuse_other(self.wanted(), self.folder)
        if self.draws and header.described.get("seed", self.seed) != self.seed:
            raise ConfigError(
                f"the store '{self.folder}' was made with seed={header.described['seed']}, but {self.seed} is wanted; take that seed, or "
                "another folder for a store with this one"
            )
        self.store = Store(self.folder)
        self.shape = without_weights(task, header.config) if header.config else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="store")

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Compare the hash of the vocabulary, and the classes."""
        self._opened().header.refuse_other({"tokenizer": vocabulary_hash(tokenizer)}, self.folder)
        if self.shape is not None:
            check_classes(self.shape, expected, "model.teacher")

    def check_rows(self, fingerprint: Callable[[], str]) -> None:
        """Compare the fingerprint of the training rows."""
        self.fingerprint = fingerprint()
        self._opened().header.refuse_other({"data": self.fingerprint}, self.folder)

    @property
    def support(self) -> Support:
        """Draws are an unbiased estimate; the likeliest classes alone leave a tail."""
        return "draws" if self.draws else "bins"

    @property
    def temperature(self) -> float:
        """That of the store."""
        return self.T

    def ahead(self, batch: Batch) -> None:
        """Begin to decode."""
        where = places(batch)
        self._coming.append((where.keys, self._pool.submit(self._decoded, where)))

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> SparseTarget:
        """Take what was decoded ahead, or decode now."""
        where, taps, held = places(batch), sorted(taps), self._opened().header.hidden
        if missing := [name for name in taps if name not in held]:
            raise ConfigError(
                f"model.losses want hidden states of the teacher that the store '{self.folder}' does not hold: {', '.join(missing)} "
                f"(it has {', '.join(held) or 'none'}); write another store with this configuration, `{command()}`"
            )
        return self._taken(where).on(batch["input_ids"].device, self.T, taps)

    def _taken(self, where: Places) -> Padded:
        number = next((i for i, (keys, _) in enumerate(self._coming) if keys == where.keys), None)
        if number is None:
            return self._decoded(where)
        for _ in range(number):  # batches come in the data's order: those before were left out, and come no more
            self._coming.popleft()
        return self._coming.popleft()[1].result()

    def _decoded(self, where: Places) -> Padded:
        found = padded([self._row(key) for key in where.keys], where)
        return found.pinned() if self.device.type == "cuda" else found

    def _row(self, key: bytes) -> StoredRow:
        store = self._opened()
        try:
            return store[key]
        except KeyError:
            raise DataError(
                f"the store '{self.folder}' does not know a row of these data: the fingerprint of its rows is {store.header.data}, that of "
                f"the training rows {self.fingerprint}; write another store with `{command()}`"
            ) from None

    def _opened(self) -> Store:
        assert self.store is not None, "setup comes first"
        return self.store

    def structure(self) -> nn.Module | None:
        """The layers of the teacher that was asked, without weights."""
        return self.shape

    def measured(self) -> dict[str, float]:
        """Give what `cache` measured of the teacher on the validation rows; empty where there were none."""
        return {name.removeprefix("val/"): value for name, value in self._opened().measures.items() if name.startswith("val/")}

    def describe(self) -> dict[str, Any]:
        """Give what was counted of the teacher that was asked, and how large the store is."""
        store = self._opened()
        return {**store.header.described, "store_megabytes": sum(shard.manifest.bytes for shard in store.shards) / 1e6}


def vocabulary_hash(tokenizer: Any) -> str:
    """Hash which token has which id."""
    return hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()


def revision(source: Teacher) -> str | None:
    """The revision of a hub id, where the teacher has one."""
    return source.revision if isinstance(source, OnlineTeacher) else None


def command() -> str:
    """The command that writes the store for what this process was asked to do."""
    trains = sys.argv[1:2] in (["fit"], ["validate"], ["test"])
    return shlex.join(["python", "train.py", "cache", *sys.argv[2:]]) if trains else "python train.py cache --config …"
