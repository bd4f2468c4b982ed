"""ONNX: ONNX Runtime gives the student's logits, and a learned grid is in the file to the bit."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.compress.ptq import ptq
from distill.export import onnx as ours
from distill.export.compare import compare
from distill.export.driver import export, parse
from distill.export.grid import grids_of
from distill.report.costs.served import logits_of
from distill.types import DistillError
from tests.disk import disk
from tests.export.sources import batches, bert, llama, mixed, source

onnx: Any = pytest.importorskip("onnx", reason="the format needs onnx")
pytest.importorskip("onnxscript", reason="the format needs onnxscript")
pytest.importorskip("onnxruntime", reason="the format needs onnxruntime")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Llama on grids of 8 and 4 bits, and its graph: tracing takes seconds, so it is done once."""
    folder, given = tmp_path_factory.mktemp("llama"), mixed(num_hidden_layers=1)
    ours.graph(given, folder / ours.FILE)
    return given, folder


@pytest.fixture(scope="module")
def bert_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder, given = tmp_path_factory.mktemp("bert"), source(bert(num_hidden_layers=1))
    ours.graph(given, folder / ours.FILE)
    return given, folder


@pytest.fixture(autouse=True)
def _traced_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    used = next((name for name in ("llama_graph", "bert_graph") if name in request.fixturenames), None)
    if used:
        folder = request.getfixturevalue(used)[1]
        monkeypatch.setattr(ours, "graph", lambda _, target: [shutil.copy(file, target.parent) for file in folder.iterdir()])


def initializers(folder: Path) -> dict[str, NDArray[Any]]:
    model = onnx.load(folder / "model.onnx")
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def layers(model: Any, part: str) -> list[NDArray[Any]]:
    found = [module.weight.numpy() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and part in name]
    assert found
    return found


@pytest.mark.parametrize("precision", ["int8", "int8-static", "int4"])
def test_a_head_that_shares_the_embedding_is_quantised_too(tmp_path: Path, precision: str) -> None:
    """In floats it would be most of a small language model's file."""
    given = source(llama(num_hidden_layers=1, tie_word_embeddings=True))
    (done,) = export(given, parse([f"onnx:{precision}"], None), tmp_path)
    found = initializers(tmp_path / f"onnx-{precision}")
    assert not {name: each.shape for name, each in found.items() if each.dtype == np.float32 and each.ndim == 2 and each.shape[1] > 1}
    assert sum(each.size for each in found.values() if each.dtype in (np.int8, np.uint8)) > 2 * given.model.lm_head.weight.numel() / 2
    assert done.gap.kl < 0.02


def test_floats_are_the_students(llama_graph: tuple[Any, Path], tmp_path: Path) -> None:
    (done,) = export(llama_graph[0], parse(["onnx"], None), tmp_path)
    assert done.gap.largest < 1e-5
    assert done.gap.agreement == 1
    assert done.ratio is not None
    assert done.ratio < 2, "the weights and a graph"


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_a_scale_a_row_that_was_learned_is_carried_over_to_the_bit(llama_graph: tuple[Any, Path], tmp_path: Path, precision: str) -> None:
    (done,) = export(llama_graph[0], parse([f"onnx:{precision}"], None), tmp_path)
    assert 0 < done.gap.kl < 0.01
    inside = initializers(tmp_path / f"onnx-{precision}")
    stored = [(inside[f"{name.removesuffix('_quantized')}_scale"], value) for name, value in inside.items() if name.endswith("_quantized")]
    assert len(stored) == 8, "seven and the head"
    assert all(levels.dtype == np.int8 for _, levels in stored)
    # [in, out] · [out]
    weights = [(levels.astype(np.float32) * scales).T for scales, levels in stored if levels.ndim == 2]
    for weight in layers(llama_graph[0].model, "self_attn"):
        assert any(weight.shape == other.shape and np.array_equal(weight, other) for other in weights)
        chosen = np.abs(weight).max(1, keepdims=True) / 127
        assert not np.array_equal((np.round(weight / chosen) * chosen).astype(np.float32), weight), "chosen anew it would differ"
    for weight in layers(llama_graph[0].model, "down_proj"):  # two groups do not fit into one scale: rounded to 8 bits
        gap = min(np.abs(weight - other).max() for other in weights if other.shape == weight.shape)
        assert 0 < gap <= np.abs(weight).max() / 127


def test_blocks_that_were_learned_are_carried_over_to_the_bit(llama_graph: tuple[Any, Path], tmp_path: Path) -> None:
    (done,) = export(llama_graph[0], parse(["onnx:int4"], None), tmp_path)
    assert 0 < done.gap.kl < 0.05
    inside = initializers(tmp_path / "onnx-int4")
    names = [name.removesuffix("_blocks") for name in inside if name.endswith("_blocks")]
    assert len(names) == 8
    weights = []
    for name in names:
        packed, scales = inside[f"{name}_blocks"], inside[f"{name}_scales"]
        if packed.shape[-1] == 16:  # element 2i in the low half of a byte
            levels = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], 32).astype(np.int8) - 8
            weights.append((levels * scales.reshape(*packed.shape[:2], 1)).reshape(len(packed), -1))
    assert len(weights) == 7, "all but the head"
    for weight in layers(llama_graph[0].model, "mlp"):
        assert any(weight.shape == other.shape and np.array_equal(weight, other) for other in weights)
    for weight in layers(llama_graph[0].model, "self_attn"):
        gap = min(np.abs(weight - other).max() for other in weights if other.shape == weight.shape)
        assert 0 < gap <= np.abs(weight).max() / 15 * 1.01


def test_embeddings_have_a_scale_a_row(llama_graph: tuple[Any, Path], tmp_path: Path) -> None:
    export(llama_graph[0], parse(["onnx:int8"], None), tmp_path)
    inside = initializers(tmp_path / "onnx-int8")
    ((name, levels),) = [(name, value) for name, value in inside.items() if name.endswith("_levels")]
    table = llama_graph[0].model.get_input_embeddings().weight.numpy()
    stored = levels * inside[name.replace("_levels", "_scales")]
    assert levels.dtype == np.int8
    assert (np.abs(stored - table) <= np.abs(table).max(1, keepdims=True) / 254 * 1.001).all()
    assert not any(value.shape == table.shape and value.dtype == np.float32 for value in inside.values()), "the floats are gone"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-static"])
def test_an_encoder(bert_graph: tuple[Any, Path], tmp_path: Path, precision: str) -> None:
    (done,) = export(bert_graph[0], parse([f"onnx:{precision}"], None), tmp_path)
    assert done.gap.kl < (1e-9 if precision == "fp32" else 1e-3)
    assert done.folder is not None
    run = ours.Onnx(precision).load(done.folder, bert_graph[0].task)
    assert run(next(iter(batches()))).shape == (3, 3)


def test_weights_beyond_one_file(bert_graph: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "INLINE", 1000)
    done = export(bert_graph[0], parse(["onnx", "onnx:int8"], None), tmp_path)
    for each in done:
        assert each.gap.kl < 1e-3
        assert each.folder is not None
        names = sorted(file.name for file in each.folder.iterdir() if "token" not in file.name)
        assert names == ["export.json", "model.onnx", "model.onnx.data"]


def test_a_full_disk_leaves_the_export_that_was_there(bert_graph: tuple[Any, Path], tmp_path: Path) -> None:
    wanted = parse(["onnx:int8"], None)
    with disk(tmp_path / "small", "2m") as folder:
        export(bert_graph[0], wanted, folder)
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        (folder / "more").write_bytes(bytes((2 << 20) - used - 150_000))
        with pytest.raises(DistillError, match="is untouched"):
            export(bert_graph[0], wanted, folder)
        run = wanted[0].load(folder / "onnx-int8", bert_graph[0].task)
        assert compare(partial(logits_of, bert_graph[0].model), run, batches()).kl < 1e-3


def test_what_torch_cannot_trace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(llama())

    def decides(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.onnx.errors.OnnxExporterError("the reason\nof many lines")

    monkeypatch.setattr(torch.onnx, "export", decides)
    with pytest.raises(DistillError, match="onnx: torch cannot trace llama: the reason of many lines; take another format"):
        export(given, parse(["onnx"], None), tmp_path)


@pytest.mark.parametrize(("scheme", "include"), [("int8", None), ("ternary", None), ("int8", ["*"])])
def test_an_encoder_on_a_grid_keeps_its_integers(tmp_path: Path, scheme: str, include: list[str] | None) -> None:
    """Its pooler is a Gemm in the float graph, with a matrix that ONNX Runtime turns where it makes a product of integers of it."""
    model = ptq(bert(num_hidden_layers=1), scheme, include=include)
    (done,) = export(source(model), parse(["onnx:int8"], None), tmp_path)
    assert done.gap.kl < 1e-3
    stored = [each for name, each in initializers(tmp_path / "onnx-int8").items() if name.endswith("_quantized")]
    for grid in grids_of(model).values():
        assert any(np.array_equal(grid.levels.numpy().T, each) for each in stored)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_of_which_nothing_is_left(tmp_path: Path, precision: str) -> None:
    """Two that are all zeros have the same bytes, whatever their shapes."""
    model = llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    (done,) = export(source(ptq(model, "int4" if precision == "int4" else "int8")), parse([f"onnx:{precision}"], None), tmp_path)
    assert done.gap.kl < 0.05


def test_a_head_on_a_grid_of_4_bits_keeps_it(tmp_path: Path) -> None:
    model = ptq(llama(num_hidden_layers=1), "int4", include=["*"])
    export(source(model), parse(["onnx:int4"], None), tmp_path)
    inside = initializers(tmp_path / "onnx-int4")
    (name,) = (name for name, each in inside.items() if name.endswith("_blocks") and each.shape[-1] == 32)
    levels = inside[name].astype(np.int32) - 128
    weight = levels * inside[name.replace("_blocks", "_scales")].reshape(*levels.shape[:2], 1)
    assert np.array_equal(weight.reshape(len(levels), -1).astype(np.float32), model.lm_head.weight.numpy())
