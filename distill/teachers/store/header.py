"""What a store says of itself: whose targets of which data it holds, and how; and that it is finished."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from distill.teachers.store.record import read_record, write_file, write_record
from distill.types import ConfigError, DataError

HEADER, ORDER, FINISHED = "header.json", "order.bin", "finished.json"
VERSION = 1
MENDING = "write it again with `python train.py cache --config …`, which makes what is missing or damaged and keeps the rest"


@dataclass(frozen=True, slots=True)
class Header:
    """What a store holds.

    Attributes:
        teacher: name, as in the configuration.
        revision: of the hub id, None for a folder.
        weights: hash of the teacher's weights.
        tokenizer: hash of the data's tokenizer.
        num_classes: V.
        temperature: T that the targets are made with.
        k: likeliest classes kept, 0 for none.
        draws: random draws kept, 0 for none.
        bits: of a probability: 8, 16 or 32; counts of draws are exact with any.
        data: fingerprint of the rows.
        rows: how many rows there are, over all shards.
        rows_per_shard: R; shard i holds rows `[i · R, min((i + 1) · R, rows))`.
        hidden: width D by the name of a tap.
        config: the teacher's configuration, for a model of its layers without weights.
        described: what `Teacher.describe` gave.
        version: of the format.
    """

    teacher: str
    revision: str | None
    weights: str
    tokenizer: str
    num_classes: int
    temperature: float
    k: int
    draws: int
    bits: Literal[8, 16, 32]
    data: str
    rows: int
    rows_per_shard: int
    hidden: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def num_shards(self) -> int:
        """Shards of a finished store."""
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The rows that a shard holds."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    @property
    def digest(self) -> str:
        """A hash of all fields."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def refuse_other(self, expected: Mapping[str, Any], folder: Path) -> None:
        """Stop where the store is not what is wanted.

        Args:
            expected: fields by name, any number of them; `asdict(header)` for all.
            folder: of the store, for the message.

        Raises:
            ConfigError: a field differs; the message has the first one's two values.
        """
        for each in fields(self):
            mine, theirs = getattr(self, each.name), expected.get(each.name)
            if each.name in expected and mine != theirs:
                name, mine, theirs = _first_difference(each.name, mine, theirs)
                raise ConfigError(
                    f"the store '{folder}' was made with {name}={mine!r}, but {theirs!r} is wanted; "
                    "take the configuration that it was made with, or write another one with `python train.py cache --config …`"
                )


def _first_difference(name: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Go into mappings: a model's configuration has a hundred values, of which one differs."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return name, mine, theirs
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key]:
            return _first_difference(f"{name}.{key}", mine[key], theirs[key])
    return name, mine, theirs


def create(folder: Path, header: Header, counts: NDArray[Any]) -> None:
    """Begin a store, or go on with the one that is there. To be called by one process, before any shard is written.

    What is damaged of it is written again; shards that then do not belong to it any more are none, see `finished_shards`.

    Args:
        folder: made if need be.
        header: of the store.
        counts: `[V]`, how often each class is a label (`DataModule.class_counts`), or zeros; only the size of the store depends on it.

    Raises:
        ConfigError: the folder holds another store.
        DataError: the disk refuses.
    """
    assert counts.shape == (header.num_classes,), "one count a class"
    with suppress(DataError):
        read_header(folder).refuse_other(asdict(header), folder)
        read_order(folder)
        return
    packed = zstandard.compress(np.argsort(-counts, kind="stable").astype("<i4").tobytes())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / ORDER, [hashlib.sha256(packed).digest(), packed])
        write_record(folder / HEADER, asdict(header))
    except OSError as error:
        raise DataError(f"cannot begin a store in '{folder}': {error.strerror}") from error


def read_header(folder: Path) -> Header:
    """Read what a store says of itself.

    Raises:
        DataError: there is no store, or it is damaged.
        ConfigError: it is of another version of the format.
    """
    try:
        found = read_record(folder / HEADER)
    except FileNotFoundError:
        raise DataError(f"'{folder}' holds no store of a teacher's targets; write it with `python train.py cache --config …`") from None
    if found.get("version") != VERSION:
        raise ConfigError(
            f"the store '{folder}' has version {found.get('version')} of the format, this program reads {VERSION}; write another one"
        )
    return Header(**found)


def read_order(folder: Path) -> NDArray[np.int32]:
    """The classes by falling frequency, `[V]`.

    Raises:
        DataError: the file is not what was written.
    """
    data = (folder / ORDER).read_bytes() if (folder / ORDER).exists() else b""
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise DataError(f"'{folder / ORDER}' is damaged, and no row can be read without it; {MENDING}")
    return np.frombuffer(zstandard.decompress(data[32:]), "<i4")


def identity(folder: Path) -> str:
    """A hash of all that a shard must agree with to be one of this store.

    Raises:
        DataError: there is no store, or it is damaged.
    """
    order = hashlib.blake2b(read_order(folder).tobytes(), digest_size=16).hexdigest()
    return f"{read_header(folder).digest}-{order}"


def finish(folder: Path, measures: Mapping[str, float]) -> None:
    """Say that all shards are there. To be called by one process, after all shards are written.

    Args:
        folder: of the store.
        measures: of the teacher on validation rows.

    Raises:
        DataError: the disk refuses.
    """
    try:
        write_record(folder / FINISHED, {"measures": dict(measures), "store": identity(folder)})
    except OSError as error:
        raise DataError(f"cannot write '{folder / FINISHED}': {error.strerror}; make room, then go on with the same command") from error


def finished(folder: Path) -> dict[str, float] | None:
    """The teacher's measures on validation rows where the store is finished, else None; also where the file is damaged or of another."""
    with suppress(DataError, FileNotFoundError):
        found = read_record(folder / FINISHED)
        if found["store"] == identity(folder):
            return dict(found["measures"])
    return None
