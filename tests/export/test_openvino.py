"""OpenVINO: its runtime gives the student's logits, and a learned grid is in the file to the bit."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.compress.ptq import ptq
from distill.export import openvino as ours
from distill.export.compare import compare
from distill.export.driver import export, parse
from distill.report.costs.served import logits_of
from distill.types import DistillError
from tests.disk import disk
from tests.export.sources import batches, bert, llama, low_rank, source

pytest.importorskip("openvino", reason="the format needs openvino")
pytest.importorskip("nncf", reason="int8 needs nncf")
pytestmark = pytest.mark.slow


def weights(folder: Path) -> list[NDArray[Any]]:
    """Every int8 constant times its scale."""
    import openvino as ov

    found = []
    for op in ov.Core().read_model(folder / "model.xml").get_ops():
        if op.get_type_name() == "Multiply":
            levels, scale = (op.input_value(i).get_node() for i in (0, 1))
            if levels.get_type_name() == "Convert" and levels.input_value(0).get_element_type() == ov.Type.i8:
                found.append(levels.input_value(0).get_node().get_data().astype(np.float32) * scale.get_data())
    return found


@pytest.fixture(scope="module")
def traced() -> dict[str, tuple[Any, Any]]:
    """An encoder of 8 bits and a Llama of three values, and their graphs: tracing takes seconds, so it is done once."""
    given = {"bert": source(ptq(bert(num_hidden_layers=1), "int8")), "llama": source(ptq(llama(num_hidden_layers=1), "ternary"))}
    return {name: (each, ours.graph(each)) for name, each in given.items()}


@pytest.fixture
def given(request: pytest.FixtureRequest, traced: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    found, graph = traced[request.param]
    monkeypatch.setattr(ours, "graph", lambda _: graph.clone())
    return found


BOTH = pytest.mark.parametrize("given", ["bert", "llama"], indirect=True)
ENCODER = pytest.mark.parametrize("given", ["bert"], indirect=True)


@BOTH
def test_floats_are_the_students(given: Any, tmp_path: Path) -> None:
    (done,) = export(given, parse(["openvino:fp32"], None), tmp_path)
    assert done.gap.largest < 1e-5
    assert done.gap.agreement == 1


@BOTH
def test_a_scale_a_row_that_was_learned_is_carried_over_to_the_bit(given: Any, tmp_path: Path) -> None:
    (done,) = export(given, parse(["openvino"], None), tmp_path)
    assert 0 < done.gap.kl < 0.05
    stored = weights(tmp_path / "openvino-int8")
    trunk = [m.weight.numpy() for name, m in given.model.base_model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in name]
    assert len(trunk) in (6, 7)
    for weight in trunk:
        assert any(weight.shape == other.shape and np.array_equal(weight, other) for other in stored)


@ENCODER
def test_without_a_learned_grid_scales_are_chosen(given: Any, tmp_path: Path) -> None:
    anew = dataclasses.replace(given, grids={})
    (done,) = export(anew, parse(["openvino"], None), tmp_path)
    assert 0 < done.gap.kl < 1e-3
    stored = weights(tmp_path / "openvino-int8")
    assert len(stored) >= 6
    weight = given.model.get_submodule("bert.encoder.layer.0.output.dense").weight.numpy()
    assert not any(weight.shape == other.shape and np.array_equal(weight, other) for other in stored), "the test above can fail"


@ENCODER
def test_a_full_disk_leaves_the_export_that_was_there(given: Any, tmp_path: Path) -> None:
    wanted = parse(["openvino:fp32"], None)
    with disk(tmp_path / "small", "1m") as folder:
        export(given, wanted, folder)
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        (folder / "more").write_bytes(bytes((1 << 20) - used - 60_000))
        with pytest.raises(DistillError, match=r"cannot write .*is untouched"):
            export(given, wanted, folder)
        run = wanted[0].load(folder / "openvino-fp32", given.task)
        assert compare(partial(logits_of, given.model), run, batches()).kl < 1e-6


def test_what_openvino_does_not_know_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(llama())

    def fails(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no conversion rule\nfor aten::odd")

    monkeypatch.setattr("openvino.convert_model", fails)
    with pytest.raises(DistillError, match="openvino: cannot trace llama: no conversion rule for aten::odd; take another format"):
        export(given, parse(["openvino"], None), tmp_path)


def test_layers_of_two_factors_are_kept(tmp_path: Path) -> None:
    model = low_rank()
    stored = model.config.quantization_config
    (done,) = export(source(model), parse(["openvino:fp32"], None), tmp_path)
    assert done.gap.kl < 1e-8
    assert model.config.quantization_config == stored
