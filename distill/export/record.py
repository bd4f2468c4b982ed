"""What an export was made of, as a small file in its folder."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.report.files import write_json

FILE = "export.json"
STUDENT = "student"  # the key of its sha256


def sha256_of(folder: Path) -> str | None:
    """Hash the weights of a student: names and SHA-256 of its safetensors files; None where there are none."""
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Leave the record in the folder of an export."""
    write_json(folder / FILE, dict(record))


def is_of(folder: Path, student: str | None) -> bool:
    """Whether an export may be of a student; one without a record may.

    Args:
        folder: of the export.
        student: its `sha256_of`.

    Raises:
        OSError: the record cannot be read.
        ValueError: it is damaged.
    """
    if not (folder / FILE).is_file():
        return True
    found = json.loads((folder / FILE).read_text(encoding="utf-8")).get(STUDENT)
    return None in (found, student) or found == student
