"""Reading a teacher: its task, its bytes, its time."""

from pathlib import Path

import pytest

from distill.advise import model
from distill.types import ConfigError
from tests import models
from tests.advise.teachers import folder, teacher


def test_the_task_is_guessed_from_the_architecture(tmp_path: Path) -> None:
    assert teacher(tmp_path / "a").task_name == "causal-lm"
    assert teacher(tmp_path / "b", "bert").task_name == "classification"
    bare = folder(tmp_path / "c", "bert", architectures=["BertModel"])
    with pytest.raises(ConfigError, match="is a BertModel, which says nothing of its task; say --task causal-lm or --task classification"):
        model.read(bare, None)
    found = model.read(bare, "classification")
    assert found.headless
    assert not model.read(folder(tmp_path / "d", "bert"), "classification").headless


def test_files_are_measured_where_there_are_some_and_else_counted(tmp_path: Path) -> None:
    counted = teacher(tmp_path / "a", dtype="bfloat16")
    assert counted.bytes == (2.0 * counted.weights.parameters, False, "counted")
    saved = models.save(models.causal_lm(), tmp_path / "b")
    measured = model.read(saved, None)
    assert measured.bytes.measured
    assert measured.bytes.value == (tmp_path / "b" / "model.safetensors").stat().st_size


def test_a_model_is_timed_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = teacher(tmp_path)
    monkeypatch.setattr(model, "SECONDS", 0.05)
    found = model.timed(t, 16, "cpu")
    assert found is not None
    assert found[1].latency_ms > 0
    assert found[1].throughput > 0
    monkeypatch.setattr(model, "ROOM", 0.0)
    assert model.timed(t, 16, "cpu") is None
    assert model.length_of(t, 1000) == 64
    assert model.length_of(t, 10) == 10


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--task: .* cannot be a causal-lm model"):
        model.read(folder(tmp_path, "distilbert", architectures=["X"]), "causal-lm")
