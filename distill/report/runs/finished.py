"""A run as its report has left it on disk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.report import rows
from distill.report.environment import private
from distill.report.gather import read_json
from distill.report.page.summary import find
from distill.report.runs.paired import Student
from distill.report.rows import Rows
from distill.types import ConfigError, DataError


@dataclass(frozen=True)
class Finished:
    """A run as its report has left it.

    Attributes:
        name: what it is called here.
        report: `report.json`.
        config: `config.yaml`, every key by its dotted path.
        rows: what its models said row by row, or why that is not known.
    """

    name: str
    report: Mapping[str, Any]
    config: Mapping[str, Any]
    rows: Rows | str

    @classmethod
    def load(cls, folder: Path, name: str) -> "Finished":
        """Read a run's folder.

        Raises:
            ConfigError: there is no such folder, or no whole report in it.
        """
        if not folder.is_dir():
            raise ConfigError(f"report: there is no folder '{folder}'; give folders of runs, e.g. runs/NAME")
        report = read_json(folder / "report.json")
        if not isinstance(report, dict) or not isinstance(report.get("sections"), dict):
            raise ConfigError(f"report: '{folder / 'report.json'}' has no chapters yet; write them first: python train.py report {folder}")
        try:
            kept: Rows | str = rows.load(folder)
        except DataError as error:
            kept = str(error)
        config = folder / "config.yaml"
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
        return cls(name, report, dict(_flat(private(settings))), kept)

    @property
    def student(self) -> str:
        """The name of its final student."""
        named = (chapter["student"] for chapter in self.report["sections"].values() if "student" in chapter)
        return str(next(named, "student distilled"))

    @property
    def same_rows(self) -> Student | None:
        """Its student's rows, where they are known."""
        known = isinstance(self.rows, Rows) and self.student in self.rows.sums
        return Student(self.rows, self.student) if isinstance(self.rows, Rows) and known else None

    def found(self, *path: str) -> Any:
        """A figure of a chapter by its keys; None where it is not there, or was not measured."""
        return find(self.report["sections"], *path)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
