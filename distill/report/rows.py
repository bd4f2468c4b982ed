"""What every model said row by row, small enough to keep: two runs are compared on the same rows without their models."""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.report.evidence import Bools, Floats, Observed
from distill.report.files import write_file
from distill.types import DataError

FIGURES = ("nll", "correct", "kl", "agreement")


@dataclass(frozen=True)
class Rows:
    """Sums over the positions of each of R held-out rows.

    Attributes:
        digest: of tokens and labels, row by row: runs with the same were measured on the same rows.
        count: `[R]`, positions.
        sums: by model and figure of `FIGURES`, `[R]`: `nll` in nats, `correct` and `agreement` how many, `kl` to the teacher in nats at
            T = 1; of the teacher, and where there is none, no `kl` and no `agreement`.
    """

    digest: str
    count: Floats
    sums: Mapping[str, Mapping[str, Floats]]

    @property
    def single(self) -> bool:
        """Whether every row is one position, as of a classifier, or none, without a label."""
        return bool((self.count <= 1).all())


def path_in(folder: Path, suffix: str = "") -> Path:
    """Where they are in a run's folder."""
    return folder / f"report_rows{suffix}.npz"


def of(observed: Observed) -> Rows:
    """Add up what was observed."""
    size = int(observed.rows.max()) + 1

    def add(column: Floats | Bools) -> Floats:
        return np.bincount(observed.rows, column, size).astype(np.float64)

    sums: dict[str, dict[str, Floats]] = {}
    for name, columns in observed.models.items():
        sums[name] = {"nll": add(columns.nll), "correct": add(columns.correct(observed.labels))}
        if columns.against is not None:
            sums[name] |= {"kl": add(columns.against.kl), "agreement": add(columns.top == observed.teacher.top)}
    return Rows(digest(observed), np.bincount(observed.rows, minlength=size).astype(np.float64), sums)


def digest(observed: Observed) -> str:
    """Hash the tokens, and which label is in which row: 16 hexadecimal digits. Labels alone are alike where files are sorted by class."""
    found = hashlib.blake2b(observed.tokens, digest_size=8)
    for part in (observed.labels, observed.rows):
        found.update(np.ascontiguousarray(part, "<i8").tobytes())
    return found.hexdigest()


def save(folder: Path, observed: Observed, suffix: str = "") -> None:
    """Write `report_rows.npz`: `count`, `digest`, `models`, and each figure `[models, R]`, NaN where a model has none."""
    rows = of(observed)
    nothing = np.full(len(rows.count), np.nan)
    arrays: dict[str, Any] = {figure: np.stack([sums.get(figure, nothing) for sums in rows.sums.values()]) for figure in FIGURES}

    def write(beside: Path) -> None:
        with beside.open("wb") as file:  # a path would be given another ending
            np.savez_compressed(file, digest=np.array(rows.digest), count=rows.count, models=np.array(list(rows.sums)), **arrays)

    write_file(path_in(folder, suffix), write)


def load(folder: Path, suffix: str = "") -> Rows:
    """Read it back.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = path_in(folder, suffix)
    try:
        with np.load(path, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in ("digest", "count", "models", *FIGURES)}
    except FileNotFoundError:
        raise DataError(f"there is no '{path}', which `distill report` writes") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' cannot be read ({error}); `distill report` writes it again") from error
    sums = {
        str(name): {figure: arrays[figure][i] for figure in FIGURES if not np.isnan(arrays[figure][i]).any()}
        for i, name in enumerate(arrays["models"])
    }
    return Rows(str(arrays["digest"]), arrays["count"], sums)
