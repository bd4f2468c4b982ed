"""The fingerprints change with what they are of, and only then."""

import subprocess
from pathlib import Path

import pytest

from distill.report.fingerprint import commit, fingerprints, sources


def package(folder: Path) -> Path:
    folder.mkdir()
    (folder / "__init__.py").write_text("a = 1\n")
    (folder / "more.py").write_text("b = 2\n")
    return folder


def git(folder: Path, *args: str) -> str:
    as_someone = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *as_someone, *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_sources_differ_by_content_name_and_place_of_the_border(tmp_path: Path) -> None:
    one = package(tmp_path / "one")
    first = sources(one)
    assert sources(package(tmp_path / "two")) == first, "the folder's own name and times do not count"
    (one / "data.txt").write_text("not a source")
    assert sources(one) == first
    (one / "more.py").write_text("b = 3\n")
    changed = sources(one)
    (one / "more.py").rename(one / "other.py")
    assert len({first, changed, sources(one)}) == 3


def test_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    git(tmp_path, "init", "-q")
    assert commit(folder) == "", "not kept by git"
    git(tmp_path, "add", "p")
    git(tmp_path, "commit", "-q", "-m", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(folder) == head
    (tmp_path / "elsewhere.txt").write_text("x")
    assert commit(folder) == head
    (folder / "more.py").write_text("b = 3\n")
    assert commit(folder) == f"{head} +"


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "p")
    assert commit(folder) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(folder) == ""


def test_all_of_them() -> None:
    found = fingerprints("the data's")
    assert list(found) == ["version", "commit", "code", "data"]
    assert found["data"] == "the data's"
    assert len(found["code"]) == 16
