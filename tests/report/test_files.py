"""Files that a reader never sees half of."""

import json
from pathlib import Path

import pytest

from distill.report.files import write_folder, write_json


def test_json_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_folder_is_whole_or_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "student"
    write_folder(target, lambda path: (path / "one").write_text("1") and None)

    def broken(path: Path) -> None:
        (path / "two").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, broken)
    assert [p.name for p in target.iterdir()] == ["one"]
    write_folder(target, lambda path: (path / "three").write_text("3") and None)
    assert [p.name for p in target.iterdir()] == ["three"]
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
