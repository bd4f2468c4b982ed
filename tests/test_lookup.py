"""Finding what a person meant."""

from pathlib import Path

import pytest

from distill.lookup import did_you_mean, find_config


def test_a_file_here_comes_before_one_in_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("")
    assert find_config("mine.yaml") == "configs/mine.yaml"
    (tmp_path / "mine.yaml").write_text("")
    assert find_config("mine.yaml") == "mine.yaml"


def test_a_name_that_is_nowhere_lists_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'kd_llama.yaml'\?; there are .*kd_bert.yaml"):
        find_config("kd_lama.yaml")


def test_only_near_words_are_offered() -> None:
    assert did_you_mean("temprature", ["temperature", "beta"]) == ". Did you mean 'temperature'?"
    assert did_you_mean("zzz", ["temperature", "beta"]) == ""
