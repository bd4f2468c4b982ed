"""How often each class is a label of the training rows."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import TypedDict

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc  # type: ignore[import-untyped]

from distill.types import IGNORE_INDEX, DataError

Counts = npt.NDArray[np.int64]

HEAD, FEW = 100, 20


class Group(TypedDict):
    """Some of the classes: how many, and how many labels they have together."""

    classes: int
    labels: int


class Profile(TypedDict):
    """How unequal the classes are.

    Attributes:
        classes: V.
        never: classes that no label has.
        fewest: labels of the rarest class that occurs.
        most: labels of the most frequent one.
        imbalance: most / fewest.
        head: the classes with more than 100 labels.
        medium: those with 20 to 100.
        few: those with 1 to 19.
        counts: the labels of each class.
    """

    classes: int
    never: int
    fewest: int
    most: int
    imbalance: float
    head: Group
    medium: Group
    few: Group
    counts: list[int]


def class_counts(rows: datasets.Dataset, num_classes: int, fingerprint: str) -> Counts:
    """Count how often each class is a label, exactly; the counts are kept in the cache of datasets.

    No collective: every rank has all rows and may ask, at any time; ranks that ask at once write the same file.

    Args:
        rows: with a column `labels` of lists of classes; −100 is none.
        num_classes: V.
        fingerprint: of the rows' content, see `digest.of_rows`.

    Returns:
        `[V]`.

    Raises:
        DataError: a label is none of the classes.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / "class_counts" / f"{fingerprint}-{num_classes}"
    kept = _read(path, num_classes)
    if kept is not None:
        return kept
    counts = _count(rows, num_classes)
    _write(path, counts)
    return counts


def profile(counts: Counts) -> Profile:
    """Summarise counts of classes, of which at least one occurs.

    The groups' limits are those of Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World", arXiv 1904.05160.

    Args:
        counts: `[V]`, how often each class is a label.
    """
    occurring = counts[counts > 0]

    def group(chosen: Counts) -> Group:
        return {"classes": len(chosen), "labels": int(chosen.sum())}

    return {
        "classes": len(counts),
        "never": len(counts) - len(occurring),
        "fewest": int(occurring.min()),
        "most": int(occurring.max()),
        "imbalance": float(occurring.max() / occurring.min()),
        "head": group(occurring[occurring > HEAD]),
        "medium": group(occurring[(occurring >= FEW) & (occurring <= HEAD)]),
        "few": group(occurring[occurring < FEW]),
        "counts": counts.tolist(),
    }


def _count(rows: datasets.Dataset, num_classes: int) -> Counts:
    counts = np.zeros(num_classes, np.int64)
    for table in rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000):
        labels = pc.list_flatten(table["labels"].combine_chunks()).to_numpy(zero_copy_only=False)
        labels = labels[labels != IGNORE_INDEX]
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise DataError(
                f"the training rows have labels from {labels.min()} to {labels.max()}, but there are {num_classes} classes, 0 to "
                f"{num_classes - 1}; a position without a label must have {IGNORE_INDEX}"
            )
        counts += np.bincount(labels, minlength=num_classes)
    return counts


def _read(path: Path, num_classes: int) -> Counts | None:
    """Give what is kept, or None where there is nothing, or not what was written."""
    if not path.exists():
        return None
    content = path.read_bytes()
    checksum, data = content[:16], content[16:]
    if len(data) != 8 * num_classes or checksum != _checksum(data):
        return None
    return np.frombuffer(data, np.dtype("<i8")).astype(np.int64)


def _write(path: Path, counts: Counts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own even among processes of several machines on one disk
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    data = counts.astype("<i8").tobytes()
    try:
        with beside.open("wb") as file:
            file.write(_checksum(data) + data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
