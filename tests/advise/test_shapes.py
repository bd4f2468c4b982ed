"""What a model is made of, counted by hand; students that transformers builds with just as many parameters."""

from pathlib import Path
from typing import Any

import pytest

from distill.advise.shapes import cuttable, fewer_layers, half_of_the_neurons, narrower, on_meta, weights_of
from distill.students.sizes import sizes_of
from tests.advise.teachers import teacher


def test_a_llama_by_hand(tmp_path: Path) -> None:
    w = weights_of(teacher(tmp_path).model)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160
    assert (w.blocks, w.block_rows) == (4 * layer, 4 * (2 * 64 + 2 * 32 + 2 * 160 + 64))
    assert (w.tables, w.table_rows, w.tied, w.head, w.trunk) == (96 * 64, 96, True, 0, 0)
    assert w.parameters == 96 * 64 + 4 * (layer + 2 * 64) + 64
    assert w.groups


def test_a_head_of_its_own(tmp_path: Path) -> None:
    w = weights_of(teacher(tmp_path, tie_word_embeddings=False).model)
    assert (w.head, w.head_rows, w.tied) == (96 * 64, 96, False)


def test_a_bert_by_hand(tmp_path: Path) -> None:
    w = weights_of(teacher(tmp_path, "bert", num_labels=3).model)
    assert w.blocks == 4 * (4 * 64 * 64 + 2 * 64 * 128)
    assert (w.trunk, w.trunk_rows) == (64 * 64, 64)  # the pooler
    assert (w.head, w.head_rows) == (3 * 64, 3)
    assert w.tables == (96 + 64 + 2) * 64
    assert not weights_of(teacher(tmp_path, "bert", intermediate_size=100).model).groups


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("bert", {}), ("llama", {"num_key_value_heads": 4, "hidden_size": 48})])
def test_students_fall_in_size_and_are_what_transformers_builds(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    t = teacher(tmp_path, kind, **changes)
    before, whole = t.weights.parameters, sizes_of(t.model)
    students = list(narrower(t.model, t.task))
    assert len(students) > 4
    for student in students:
        s, built = student.sizes, on_meta(t.task, student.config)
        assert student.weights.parameters == built.num_parameters() < before
        assert student.share == pytest.approx(student.weights.parameters / t.weights.parameters)
        step = 8 if "hidden_size" in changes or kind == "bert" else 32
        assert s.hidden % step == s.intermediate % step == s.hidden % s.heads == s.heads % s.groups == 0
        assert s.heads // s.groups == whole.heads // whole.groups
        assert (built.config.num_hidden_layers, built.config.hidden_size, built.config.intermediate_size) == (
            s.layers,
            s.hidden,
            s.intermediate,
        )
        before = student.weights.parameters
    assert students[0].sizes.layers == 4
    assert students[-1].sizes.layers == 1


def test_wide_models_are_cut_in_steps_of_64(tmp_path: Path) -> None:
    t = teacher(tmp_path, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4, num_hidden_layers=2)
    assert all(s.sizes.hidden % 64 == s.sizes.intermediate % 64 == 0 for s in narrower(t.model, t.task))


def test_fewer_layers_and_half_of_the_neurons(tmp_path: Path) -> None:
    t = teacher(tmp_path)
    assert [s.sizes.layers for s in fewer_layers(t.model, t.task)] == [3, 2, 1]
    half = half_of_the_neurons(t.model, t.task)
    assert half.weights.parameters == t.weights.parameters - 4 * 3 * 64 * 80
    assert half_of_the_neurons(t.model, t.task, 2).sizes.layers == 2


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    assert cuttable(teacher(tmp_path / "a").model) is None
    gpt2 = teacher(tmp_path / "b", "gpt2", architectures=["GPT2LMHeadModel"], intermediate_size=None)
    reason = cuttable(gpt2.model)
    assert reason is not None
    assert "'gpt2'" in reason
