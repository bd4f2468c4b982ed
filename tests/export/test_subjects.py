"""Which folders of a run are exports of its student, and what is said of those that are not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.export import record
from distill.export.driver import all_formats, export, parse
from distill.export.subjects import exported, exports_in, home_of, loaded
from distill.tasks import CausalLM
from tests.export.sources import llama, source

PROBE = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
REAL = ("hf", "packed", "torchao", "onnx", "openvino", "gguf")


def test_every_precision_of_every_format_is_found(tmp_path: Path) -> None:
    wanted = {f"{name}-{precision}": (name, precision) for name in REAL for precision in all_formats()[name].precisions}
    assert "onnx-int8-static" in wanted
    for name in wanted:
        (tmp_path / "export" / name).mkdir(parents=True)
    absent: dict[str, str] = {}
    assert exports_in(tmp_path, absent) == {name: (tmp_path / "export" / name, *each) for name, each in wanted.items()}
    assert not absent


def test_a_folder_that_is_no_export_is_named_and_leftovers_and_files_are_not(tmp_path: Path) -> None:
    for name in ("hf-fp32", "notes", "hf", "hf-", "my-hf", ".hf-bf16.tmp"):
        (tmp_path / "export" / name).mkdir(parents=True)
    (tmp_path / "export" / "hf-bf16").write_text("a file")
    absent: dict[str, str] = {}
    assert list(exports_in(tmp_path, absent)) == ["hf-fp32"]
    assert sorted(absent) == ["export/hf", "export/hf-", "export/my-hf", "export/notes"]
    assert absent["export/notes"].startswith("it is no export: its name is not FORMAT-PRECISION with a FORMAT of gguf, hf, onnx,")


def test_there_may_be_none(tmp_path: Path) -> None:
    absent: dict[str, str] = {}
    assert not loaded(tmp_path, CausalLM(), PROBE, absent)
    assert not absent


def test_what_was_quantised_after_training_has_folders_of_its_own(tmp_path: Path) -> None:
    assert home_of(tmp_path) == tmp_path / "export"
    for home in (home_of(tmp_path, "int3"), home_of(tmp_path, "int4", 32), home_of(tmp_path, "int8-int4", "row")):
        (home / "hf-fp32").mkdir(parents=True)
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["export-ptq-int3", "export-ptq-int4-32", "export-ptq-int8-int4-row"]
    assert list(exports_in(tmp_path, {})) == ["ptq-int3: hf-fp32", "ptq-int4-32: hf-fp32", "ptq-int8-int4-row: hf-fp32"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A student with exports of it, in a folder of a run."""
    model = llama()
    model.save_pretrained(tmp_path / "student")
    made_of = {record.STUDENT: record.sha256_of(tmp_path / "student"), "ptq": None}
    export(source(model), parse(["hf", "hf:bf16"], None), tmp_path / "export", made_of=made_of)
    return tmp_path


def test_an_export_of_an_older_student_is_not_taken_for_one_of_this(run: Path) -> None:
    absent: dict[str, str] = {}
    assert list(loaded(run, CausalLM(), PROBE, absent)) == ["hf-bf16", "hf-fp32"]
    assert not absent
    found = json.loads((run / "export/hf-bf16/export.json").read_text())
    assert found == {"format": "hf", "precision": "bf16", "student": record.sha256_of(run / "student"), "ptq": None}
    (run / "export/hf-fp32/export.json").unlink()
    weights = load_file(run / "student/model.safetensors")
    next(iter(weights.values())).mul_(1.5)
    save_file(weights, run / "student/model.safetensors", {"format": "pt"})
    assert list(loaded(run, CausalLM(), PROBE, absent)) == ["hf-fp32"], "one without the record is taken"
    assert absent == {"hf-bf16": f"it is of another student than {run / 'student'}; export again"}


def test_one_that_loads_and_does_not_run_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = all_formats()["hf"].load

    def load(self: Any, folder: Path, task: Any) -> Any:
        return before(self, folder, task) if folder.name == "hf-fp32" else lambda batch: batch["no such input"]

    monkeypatch.setattr(all_formats()["hf"], "load", load)
    absent: dict[str, str] = {}
    assert list(exported(run, CausalLM(), PROBE, absent)) == ["hf-fp32"]
    assert absent == {"hf-bf16": "it cannot be run: 'no such input'"}


def test_the_report_is_told_whose_runtime_is_elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_formats()["gguf"].runtime == "llama.cpp"
    monkeypatch.setattr(all_formats()["hf"], "runtime", "another")
    assert [each.runtime for each in exported(run, CausalLM(), PROBE, {}).values()] == ["another"] * 2


@pytest.mark.parametrize("text", ["", "[]", '{"student"'])
def test_a_damaged_record_is_said(run: Path, text: str) -> None:
    (run / "export/hf-bf16/export.json").write_text(text)
    absent: dict[str, str] = {}
    assert list(loaded(run, CausalLM(), PROBE, absent)) == ["hf-fp32"]
    assert absent["hf-bf16"].startswith("it cannot be loaded: ")


def test_the_hash_is_of_all_weights_and_their_names(tmp_path: Path) -> None:
    found = {record.sha256_of(tmp_path)}
    for name, text in (("a.safetensors", b"xy"), ("b.safetensors", b""), ("a.safetensors", b"x"), ("b.safetensors", b"y")):
        (tmp_path / name).write_bytes(text)
        found.add(record.sha256_of(tmp_path))
    assert len(found) == 5
    assert None in found
    before = record.sha256_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert record.sha256_of(tmp_path) == before
