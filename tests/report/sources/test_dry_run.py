"""What the dry run shows."""

from pathlib import Path

import pytest

from distill.report.sources.dry_run import marked, memory, vocabulary
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from tests import pair


def test_trained_tokens_are_marked() -> None:
    assert marked([("What", False), (" is", False), (" it", True), ("?", True), ("\n", False)]) == "What is⟦ it?⟧\n"
    assert marked([("ab", True)] * 10, longest=5) == "⟦abab … (10 tokens)"


def test_memory_and_vocabulary_of_a_pair(tmp_path: Path) -> None:
    data, module = pair.data(tmp_path, batch_size=4), pair.module(tmp_path)
    pair.trainer(max_steps=1).fit(module, data)
    parts = memory(module)
    count = sum(p.numel() for p in module.student.parameters())
    assert parts["student"] == 4 * count
    assert parts["gradients"] == 4 * count
    assert parts["AdamW"] == 8 * count
    assert parts["teacher"] == pytest.approx(4 * sum(p.numel() for p in module.teacher.model.parameters()))
    assert parts["activations"] == 17 * 4 * 32 * 16 * 1 * 4, "values × rows × length × width × layers × bytes"
    assert parts["sum"] == pytest.approx(sum(v for k, v in parts.items() if k not in ("sum", "(logits of a dense loss)")))
    report = vocabulary(module)
    assert report["student"] == report["teacher"] == "head of 16; 0 left out before the softmax"


def test_memory_and_vocabulary_of_several_teachers(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=4)
    folder = str(tmp_path / "teacher")
    module = pair.module(tmp_path, teacher=Ensemble([OnlineTeacher(folder), OnlineTeacher(folder, dtype="bfloat16")]))
    pair.trainer(max_steps=1).fit(module, data)
    assert module.teacher is not None
    parts, counts = memory(module), [sum(p.numel() for p in model.parameters()) for model in module.teacher.models()]
    assert parts["teacher"] == pytest.approx(4 * counts[0] + 2 * counts[1])
    assert parts["logits, in chunks"] == 3 * 16.0 * 4 * 32 * 16, "student and two teachers, rows × length × classes"
    report = vocabulary(module)
    assert report["teacher 1"] == report["teacher 2"] == "head of 16; 0 left out before the softmax"
