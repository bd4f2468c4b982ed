"""The forms of a teacher with made-up times: every figure from its formula, in the order that the tree wants."""

from dataclasses import replace
from pathlib import Path

import pytest

from distill.advise import known, stored
from distill.advise.decide import decide
from distill.advise.forms import FLOOR, Forms
from distill.advise.parts import Budget, Loss, Situation
from distill.advise.shapes import narrower
from tests.advise.teachers import TIMES, forms


def test_a_classifier_for_size(tmp_path: Path) -> None:
    made = forms(tmp_path, "bert")
    found = made.all("size")
    kinds = list(dict.fromkeys((form.kind, form.scheme) for form in found))
    assert kinds == [
        ("keep", None),
        ("ptq", None),
        ("qat", "int4"),
        ("qat", "int3"),
        ("qat", "ternary"),
        ("distil", None),
        ("combine", "int4"),
        ("combine", "ternary"),
    ]
    assert [form.export for form in found if form.kind == "ptq"] == ["hf:bf16", "openvino:int8", "onnx:int8", "onnx:int4"]
    w = made.teacher.weights
    assert all(form.bytes == stored.of(w, form.export) for form in found if form.kind == "ptq")
    distilled = [form for form in found if form.kind == "distil"]
    assert all(form.parameters >= FLOOR * w.parameters for form in distilled)
    students = list(narrower(made.teacher.model, made.teacher.task))
    assert len([form for form in found if form.kind == "combine" and form.scheme == "int4"]) == len(students)
    for kind in ("distil", "combine"):
        sizes = [form.bytes.value for form in found if form.kind == kind and form.scheme != "ternary"]
        assert sizes == sorted(sizes, reverse=True)


def test_milliseconds_by_hand(tmp_path: Path) -> None:
    found = {form.name: form.ms for form in forms(tmp_path, "bert").all("latency") if form.ms}
    assert found["the teacher as it is"] == (10.0, True, "the whole model")
    assert found["int8, openvino"].value == pytest.approx(2 + 4 * 0.5)  # 2 ms are not in layers
    assert not found["int8, openvino"].measured
    assert found["half of the neurons, openvino:fp32"].value == pytest.approx(2 + 4 * 1.6 * 1.5 / 2.0)
    assert found["half of the neurons, openvino:int8"].value == pytest.approx(2 + 4 * 0.5 * 1.5 / 2.0)
    assert found["3 × 64 (FFN 128), int8"].value == pytest.approx(2 + 3 * 0.5)
    assert found["1 × 64 (FFN 64), int8"].value == pytest.approx(2 + 1 * 0.5 * 1.5 / 2.0)


def test_a_model_that_was_not_timed_is_its_layers(tmp_path: Path) -> None:
    made = forms(tmp_path, "bert")
    found = Forms(made.teacher, replace(made.measured, teacher_ms=None), None).keep().ms
    assert found == (8.0, False, "4 × a layer")


def test_layers_slower_than_the_whole_do_not_make_less_than_nothing(tmp_path: Path) -> None:
    made = forms(tmp_path, "bert")
    found = Forms(made.teacher, replace(made.measured, teacher_ms=6.0), None).all("latency")
    assert next(form.ms for form in found if form.name == "int8, openvino" and form.ms).value == pytest.approx(6 * 0.5 / 2.0)


def test_pruning_is_left_out_where_it_gains_nothing(tmp_path: Path) -> None:
    made = forms(tmp_path, "bert")
    assert made.pruning_gains
    slow = Forms(made.teacher, replace(made.measured, layer_ms=TIMES | {"half the neurons": 1.95}), None)
    assert not slow.pruning_gains
    assert "prune" not in {form.kind for form in slow.all("latency")}
    assert "distil" in {form.kind for form in slow.all("latency")}


def test_runtimes_that_are_not_here_are_left_out(tmp_path: Path) -> None:
    made = forms(tmp_path, "bert")
    bare = Forms(made.teacher, replace(made.measured, layer_ms={"fp32": 2.0, "bf16": 1.0, "half the neurons": 1.5}), None)
    exports = {form.export for target in ("size", "latency") for form in bare.all(target)}  # type: ignore[arg-type]
    assert not any(export.startswith(("onnx", "openvino")) for export in exports)
    assert {form.kind for form in bare.all("size")} == {"keep", "ptq", "qat", "distil", "combine"}


def test_another_architecture_is_exported_and_quantised_but_not_cut(tmp_path: Path) -> None:
    made = forms(tmp_path, "gpt2", architectures=["GPT2LMHeadModel"], intermediate_size=None)
    assert made.reason is not None
    assert {form.kind for form in made.all("latency")} == {"keep", "ptq"}


def test_tokens_and_hours(tmp_path: Path) -> None:
    made = forms(tmp_path)
    found = made.all("size")
    qat = next(form for form in found if form.kind == "qat")
    new = next(form for form in found if form.kind == "distil")
    assert qat.tokens == made.teacher.weights.parameters // 2
    assert new.tokens == 20 * new.parameters
    asked = {form.tokens for form in forms(tmp_path, tokens=1000).all("size") if form.trained}
    assert asked == {1000}
    # 2 N forward of both, 4 N backward of the student, attention beside; the embedding is the head and counts
    n = made.teacher.weights.parameters
    assert qat.hours is not None
    attention = 4 * 4 * 64 * 32 / 2
    assert qat.hours.value == pytest.approx(qat.tokens * 4 * (2 * n + attention) / 1e9 / 3600, rel=1e-6)
    assert new.hours is not None
    assert new.hours.value < 40 * qat.hours.value


def test_losses_measured_on_this_model_come_first(tmp_path: Path) -> None:
    measured = {"int4": Loss(1.0, "nats", True, "t"), "int8": Loss(0.5, "nats", True, "t")}
    found = forms(tmp_path, losses=measured).all("size")
    by_name = {form.name: form.loss for form in found}
    assert by_name["int4, packed"] == measured["int4"]
    assert by_name["int8, torchao"] == measured["int8"]
    openvino = by_name["int8, openvino"]
    assert openvino is not None
    assert (openvino.value, openvino.measured) == (0.5, False)  # it rounds inputs as well
    qat = by_name["QAT int4"]
    assert qat is not None
    assert qat.value == pytest.approx(1.0 * (1 - 0.71))
    assert not qat.measured
    assert {form.loss for form in forms(tmp_path).all("size") if form.name == "int4, packed"} == {known.ROUNDED["causal-lm", "int4"]}


def test_notes_of_what_is_shipped(tmp_path: Path) -> None:
    found = {form.export: form.note for form in forms(tmp_path).all("size")}
    assert "no cache" in found["openvino:int8"]
    assert "on the disk" in found["packed:int4"]
    assert all(not form.note for form in forms(tmp_path, "bert").all("size") if form.export.startswith("o"))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("target", ["size", "latency"])
def test_a_smaller_budget_never_leads_to_a_larger_model(tmp_path: Path, kind: str, target: str) -> None:
    found = forms(tmp_path, kind).all(target)  # type: ignore[arg-type]
    unit, whole = ("bytes", found[0].bytes.value) if target == "size" else ("ms", 10.0)
    before, leaves = float("inf"), set()
    for i in range(150):
        limit = whole * 1.02 * 0.96**i
        advice = decide(Situation(target, Budget(limit, unit, ""), None, found, {}, {}))  # type: ignore[arg-type]
        leaves.add(advice.leaf)
        if advice.leaf == "impossible":
            continue
        form = next(step.form for step in reversed(advice.steps) if advice.leaf == step.form.kind)
        now = form.bytes.value if target == "size" else form.ms.value if form.ms else 0.0
        assert now <= min(before, limit)
        before = now
    assert leaves >= {"keep", "ptq", "combine", "impossible"}
    assert target == "size" or {"prune", "distil"} <= leaves
