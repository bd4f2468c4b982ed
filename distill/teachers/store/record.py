"""Small JSON files that say themselves whether they are whole, and the writing of any file so that no reader sees half of it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.checkpoints import beside
from distill.types import DataError

_CHECK = "blake2b"  # of the other fields


def write_record(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a record; the path holds the former one, or this one whole."""
    write_file(path, [json.dumps({**fields, _CHECK: _digest(fields)}, indent=2).encode()])


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is not what was written.
    """
    try:
        fields = json.loads(path.read_bytes())
        check = fields.pop(_CHECK)
        whole = check == _digest(fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"'{path}' is damaged: it is not what was written; write the store again with `python train.py cache --config …`")
    return dict(fields)


def write_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file beside its place, sync it, and rename it.

    Raises:
        OSError: the disk refuses; the path is as it was, and nothing is left beside it.
    """
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some network filesystems refuse to fsync a folder, and need not
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
