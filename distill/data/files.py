"""Rows from local files or the hub, with every mistake said in a sentence."""

import codecs
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from distill import hub
from distill.data import digest
from distill.types import ConfigError, DataError

READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SLOW = 50_000_000  # bytes: from here on a progress bar is welcome


def read(source: str, key: str, revision: str | None = None, names: Sequence[str] | None = None) -> datasets.Dataset:
    """Read the rows of a file, or of a data set on the hub.

    A `.txt` file is one row, its whole text in the column `text`; `.json`, `.jsonl`, `.csv`, `.tsv` and `.parquet` have a row
    per record. All columns of CSV and TSV are text (an empty field is an empty text, `NA` is the text NA); a quotation mark
    has no special meaning in TSV.

    Args:
        source: path of a file, or `org/name`, `org/name:split`, `org/name:config:split` on the hub (the split is `train` if not given).
        key: the key of the configuration that holds `source`, for messages.
        revision: of the hub's data set.
        names: of the columns of a CSV or TSV file without a header.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, or has a row that cannot be read.
    """
    path = Path(source).expanduser()
    rows = _read_file(path, key, names) if path.exists() or _looks_local(source) else _read_hub(source, key, revision)
    if len(rows) == 0:
        raise DataError(f"{key}: '{source}' has no rows")
    return rows


def _read_file(path: Path, key: str, names: Sequence[str] | None) -> datasets.Dataset:
    if not path.exists():
        raise DataError(f"{key}: no file '{path}'; {_nearest(path)}")
    if path.is_dir() or path.suffix not in READERS:
        kind = "a folder" if path.is_dir() else f"of an unknown kind '{path.suffix}'"
        raise DataError(f"{key}: '{path}' is {kind}; give a file that ends in {', '.join(READERS)}")
    with path.open("rb") as file:
        empty = file.read(4) in (b"", codecs.BOM_UTF8)
    if empty:
        raise DataError(f"{key}: '{path}' is an empty file")
    try:
        with progress(path.stat().st_size > SLOW):
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path.resolve()), split="train", **_options(path, names))
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{key}: '{path}' has no rows") from error
        raise DataError(f"{key}: cannot read '{path}': {_unreadable(path, error)}") from error


def _options(path: Path, names: Sequence[str] | None) -> dict[str, Any]:
    if path.suffix == ".txt":
        return {"sample_by": "document"}
    if READERS[path.suffix] != "csv":
        return {}
    dialect: dict[str, Any] = (
        {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"sep": ",", "quoting": csv.QUOTE_MINIMAL}
    )
    if names is None:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file, delimiter=dialect["sep"], quoting=dialect["quoting"]))
    else:
        columns = list(names)
    features = datasets.Features({column: datasets.Value("string") for column in columns})  # or 0012 would be read as the number 12
    return {**dialect, "names": names and columns, "keep_default_na": False, "features": features}


def _read_hub(source: str, key: str, revision: str | None) -> datasets.Dataset:
    name, *rest = source.split(":")
    split, config = (rest[-1] if rest else "train"), (rest[0] if len(rest) == 2 else None)
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, DatasetGenerationError) as error:  # every error of the hub is one of these
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{key}: no file '{source}' here ({_nearest(Path(source))}), and the hub does not give a data set of that name: {reason}"
        ) from error


def _looks_local(source: str) -> bool:
    return hub.looks_local(source) or Path(source).suffix in READERS


def _nearest(path: Path) -> str:
    folder = path.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    close = get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1) if folder == path.absolute().parent else []
    return f"did you mean '{path.parent / close[0]}'?" if close else f"the nearest folder that exists is '{folder}'"


def _unreadable(path: Path, error: BaseException) -> str:
    """Find the first bad row by reading the slow way."""
    try:
        if path.suffix == ".jsonl":
            return _bad_json_line(path) or _first_line(error)
        path.read_text(encoding="utf-8") if path.suffix != ".parquet" else None
    except UnicodeDecodeError as bad:
        line = path.read_bytes()[: bad.start].count(b"\n") + 1
        return f"row {line} is not UTF-8 text (byte 0x{bad.object[bad.start]:02x}); save the file as UTF-8"
    return _first_line(error)


def _bad_json_line(path: Path) -> str | None:
    kinds: dict[str, type] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as bad:
                return f"row {number} is not JSON: {bad.msg} at column {bad.colno}"
            if not isinstance(row, dict):
                return f"row {number} is not an object but {type(row).__name__}"
            for name, value in row.items():
                if value is not None and kinds.setdefault(name, type(value)) is not type(value):
                    return f"row {number}: '{name}' is {type(value).__name__}, but {kinds[name].__name__} in the rows before"
    return None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0] or type(cause).__name__


def need_columns(rows: datasets.Dataset, source: str, columns: Mapping[str, str | None]) -> datasets.Dataset:
    """Keep only some columns.

    Args:
        rows: to choose from.
        source: where they are from, for messages.
        columns: by the argument of the data class that names them; None for one that is not read.

    Raises:
        DataError: one is not there.
    """
    wanted = {column: argument for argument, column in columns.items() if column is not None}
    for column, argument in wanted.items():
        if column not in rows.column_names:
            close = get_close_matches(column, rows.column_names, n=1)
            raise DataError(
                f"'{source}' has no column '{column}'; it has {', '.join(rows.column_names)}; --data.{argument}=NAME chooses one"
                + (f". Did you mean '{close[0]}'?" if close else "")
            )
    return rows.select_columns(list(wanted))


def need_text(rows: datasets.Dataset, source: str, column: str) -> None:
    """Check that a column holds text in every row.

    Raises:
        DataError: a row, counted from 1, holds something else.
    """
    batches = rows.select_columns([column]).with_format(None).iter(batch_size=1000)
    for number, value in enumerate((value for batch in batches for value in batch[column]), start=1):
        if not isinstance(value, str):
            raise DataError(f"'{source}' row {number}: '{column}' must be text, but is {type(value).__name__} ({value!r:.60})")


def hold_out(rows: datasets.Dataset, fraction: float, source: str) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Split off a share of the rows for validation, by a hash of their content.

    The split is the same in every process and order of the file, and equal rows are on the same side.

    Raises:
        ConfigError: the fraction is not in [0, 1).
        DataError: there are not two different rows.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.val_fraction must be at least 0 and less than 1, got {fraction}; use 0 for no validation")
    if fraction == 0:
        return rows, None
    hashes = [digest.of(json.dumps(row, sort_keys=True, default=str)) for row in rows.with_format(None)]
    border = sorted(hashes)[max(1, round(len(rows) * fraction)) - 1]
    held = [i for i, value in enumerate(hashes) if value <= border]
    kept = [i for i, value in enumerate(hashes) if value > border]
    if not kept:
        raise DataError(
            f"'{source}' has {len(rows)} row(s), too few different ones to hold out {fraction:.0%}; "
            "give data.val_data, or data.val_fraction: 0"
        )
    return rows.select(kept), rows.select(held)


@contextmanager
def progress(show: bool) -> Iterator[None]:
    """Show or hide the progress bars of datasets while the context is open."""
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if show else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
