"""Bytes by format against the files that the exporters write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from distill.advise import stored
from distill.advise.shapes import weights_of
from distill.compress.ptq import ptq
from distill.export.base import Source
from distill.export.driver import all_formats
from distill.export.grid import grids_of
from distill.tasks import CausalLM, SequenceClassification
from tests.advise.teachers import BERT, LLAMA

LARGE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
ROWS = [{"input_ids": torch.randint(1, 96, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)} for _ in range(2)]


def made(kind: str, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    task = CausalLM() if kind == "llama" else SequenceClassification()
    return task, task.build(AutoConfig.for_model(kind, **(LLAMA if kind == "llama" else BERT) | LARGE | changes)).eval()


def written(task: Any, model: Any, export: str, folder: Path) -> int:
    name, _, precision = export.partition(":")
    source = Source(model, None, task, lambda: ROWS, grids_of(model))  # type: ignore[arg-type]
    all_formats()[name](precision).write(source, folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix not in (".json", ".xml"))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("export", ["hf:fp32", "hf:bf16", "torchao:int8", "torchao:int8-dynamic"])
def test_files_of_pytorch_are_as_counted(kind: str, export: str, tmp_path: Path) -> None:
    task, model = made(kind)
    assert stored.of(weights_of(model), export).value == pytest.approx(written(task, model, export, tmp_path), rel=0.01)


@pytest.mark.parametrize("scheme", ["int4", "int3", "ternary"])
def test_packed_files_are_at_most_as_counted(scheme: str, tmp_path: Path) -> None:
    task, model = made("llama", vocab_size=96)  # little of it is floats
    quantised = ptq(model, scheme)
    real = written(task, quantised, "packed:int4", tmp_path)
    assert 0.8 * stored.of(weights_of(model), "packed:int4", scheme).value < real
    assert real < 1.05 * stored.of(weights_of(model), "packed:int4", scheme).value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "export", "changes"),
    [
        ("llama", "onnx:int8", {}),  # the table is the head, and is there for both
        ("llama", "onnx:int4", {}),
        ("bert", "openvino:int8", {}),
        ("llama", "onnx:int4", {"tie_word_embeddings": False}),
    ],
)
def test_files_of_other_runtimes_are_as_counted(kind: str, export: str, changes: dict[str, Any], tmp_path: Path) -> None:
    for package in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf")}[export.partition(":")[0]]:
        pytest.importorskip(package, reason="the runtime is an extra")
    task, model = made(kind, **changes)
    assert stored.of(weights_of(model), export).value == pytest.approx(written(task, model, export, tmp_path), rel=0.03)


def test_by_hand() -> None:
    _, model = made("bert", num_labels=3)
    w = weights_of(model)
    assert stored.of(w, "hf:fp32") == (4 * w.parameters, False, "counted")
    inner = w.blocks + w.trunk
    bits = inner * 2 / 8 + 4 * (w.parameters - inner) * 0.829
    assert stored.of(w, "packed:int4", "ternary").value == pytest.approx(bits)
