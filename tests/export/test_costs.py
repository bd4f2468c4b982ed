"""The verb `cost` on a run with an export: what it says of quality and size is what is known otherwise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from distill.cli import main
from distill.data.classification import ClassificationData
from distill.export import costs
from distill.export.costs import quality
from distill.export.driver import all_formats
from distill.teachers.online import OnlineTeacher
from distill.types import Batch
from tests import pair
from tests.models import classifier, save
from tests.test_command import config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student with an export, in a folder that the test must be in."""
    folder = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pair.teacher_folder(folder / "teacher")
        pair.prompts(folder / "prompts.jsonl")
        (folder / "kd.yaml").write_text(yaml.safe_dump(config()))
        assert main(["--config", "kd.yaml", "--name", "a"]) == 0
        assert main(["export", "--config", "runs/a/config.yaml", "--format", "hf:bf16"]) == 0
    return folder


def cost(run: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.chdir(run)
    return main(["cost", "--config", "runs/a/config.yaml", "--rounds", "2", "--batch", "2", *args])


def test_teacher_student_and_export_side_by_side(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost(run, monkeypatch) == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "runs/a/cost.json").read_text())["models"]
    assert list(found) == ["teacher", "student", "hf-bf16"]
    assert all(name in printed for name in found)
    report = json.loads((run / "runs/a/report.json").read_text())["models"]
    for name, reported in (("teacher", "teacher"), ("student", "student distilled")):
        assert found[name]["loss"] == pytest.approx(report[reported]["loss"], rel=1e-4)
        assert found[name]["parameters"] == report[reported]["parameters"]
    assert found["student"]["disk_bytes"] == (run / "runs/a/student/model.safetensors").stat().st_size
    assert found["hf-bf16"]["disk_bytes"] < 0.6 * found["student"]["disk_bytes"]
    assert found["teacher"]["flops"] > found["student"]["flops"] > 0
    assert "estimate" in printed or "RAPL" in printed or "NVML" in printed


def test_the_table_says_where_it_was_measured(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost(run, monkeypatch) == 0
    threads = torch.get_num_threads()
    assert f"Cost on the CPU, {threads} thread{'' if threads == 1 else 's'}, timed in turn" in capsys.readouterr().out
    found = json.loads((run / "runs/a/cost.json").read_text())
    assert (found["device"], found["threads"]) == ("cpu", threads)


def test_what_has_its_runtime_elsewhere_is_not_timed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = all_formats()
    assert [name for name, each in formats.items() if each.runtime] == ["gguf"]
    monkeypatch.setattr(formats["gguf"], "runtime", None)
    monkeypatch.setattr(formats["hf"], "runtime", "another runtime")
    assert cost(run, monkeypatch) == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "runs/a/cost.json").read_text())["models"]
    assert found["hf-bf16"].keys() == found["student"].keys()
    known = {name for name, value in found["hf-bf16"].items() if value is not None}
    assert known == {"loss", "accuracy", "disk_bytes"}
    (row,) = (line.split() for line in printed.splitlines() if "hf-bf16" in line)
    assert len(row) == 5, "name, mark, loss, accuracy, MB"
    assert row[1] == "†"
    assert "† not timed: hf is for another runtime, which is not run here" in " ".join(printed.split())


def test_one_export_that_is_broken_does_not_end_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "runs/a/export"
    for name in ("hf-notes", "onnx-int8-static", "notes", "hf-fp32"):
        (home / name).mkdir()
    (home / "onnx-int8-static/model.onnx").write_bytes(b"")
    assert cost(tmp_path, monkeypatch) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "hf-notes is not measured: it cannot be loaded: precision: hf has no 'notes'; it has fp32, bf16" in printed
    assert "export/notes is not measured: it is no export" in printed
    for name in ("onnx-int8-static", "hf-fp32"):
        assert f"{name} is not measured: it cannot be loaded: " in printed
    assert list(json.loads((tmp_path / "runs/a/cost.json").read_text())["models"]) == ["teacher", "student", "hf-bf16"]


def test_a_flipped_byte_of_a_packed_file_leaves_the_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("zstandard", reason="packing needs zstandard")
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--config", "runs/a/config.yaml", "--format", "packed:bf16"]) == 0
    (packed,) = (tmp_path / "runs/a/export/packed-bf16").glob("*.packed")
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    packed.write_bytes(content)
    assert cost(tmp_path, monkeypatch) == 0
    assert "packed-bf16 is not measured: it cannot be loaded: " in capsys.readouterr().out
    assert "hf-bf16" in json.loads((tmp_path / "runs/a/cost.json").read_text())["models"]


def test_exports_after_ptq_stand_beside_the_others_and_those_of_an_older_student_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--config", "runs/a/config.yaml", "--format=hf", "--ptq=int3", "--group_size=16"]) == 0
    recorded = json.loads((tmp_path / "runs/a/export-ptq-int3-16/hf-fp32/export.json").read_text())
    assert (recorded["ptq"], recorded["group_size"]) == ("int3", 16)
    assert cost(tmp_path, monkeypatch) == 0
    found = json.loads((tmp_path / "runs/a/cost.json").read_text())["models"]
    assert list(found) == ["teacher", "student", "hf-bf16", "ptq-int3-16: hf-fp32"]
    assert found["ptq-int3-16: hf-fp32"]["loss"] != found["student"]["loss"]
    assert main(["--config", "kd.yaml", "--name", "b", "--seed_everything=1"]) == 0
    shutil.rmtree("runs/a/student")
    shutil.copytree("runs/b/student", "runs/a/student")
    capsys.readouterr()
    assert cost(tmp_path, monkeypatch) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("hf-bf16", "ptq-int3-16: hf-fp32"):
        assert f"{name} is not measured: it is of another student than runs/a/student; export again" in printed
    assert list(json.loads((tmp_path / "runs/a/cost.json").read_text())["models"]) == ["teacher", "student"]


def test_mistakes_are_said(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost(run, monkeypatch, "--rounds", "1") == 2
    assert cost(run, monkeypatch, "--batch", "4000") == 2
    assert cost(run, monkeypatch, "--name", "nothing") == 2
    said = capsys.readouterr().err
    for part in ("rounds must be at least 2", "batch is 4000, but a batch of validation rows has", "there is no student in"):
        assert part in said


def test_a_long_name_takes_lines_not_the_room_of_figures() -> None:
    figures = {"loss": 1.2345, "accuracy": 0.5, "nonzero": 22_670_000, "parameters": 22_700_000, "disk_bytes": 90_123_456, "flops": 10**9}
    figures |= {"latency_ms": 34.5, "latency_p95_ms": 134.5, "throughput": 123.0, "peak_bytes": 12_345_678, "joules": 123.6}
    rows = dict.fromkeys(("student", "packed-int8-dynamic-zipnn", "ptq-int4-32: onnx-int8-static"), figures)
    with (console := Console(width=110)).capture() as captured:
        console.print(costs.table(rows, 8, "token", 2))
    printed = captured.get()
    assert "…" not in printed
    names = "".join(line[:14].strip() for line in printed.splitlines()[4:])
    assert names.replace(":", ": ") == "".join(rows)


def test_quality_by_hand() -> None:
    labels = torch.tensor([[0, 1, -100], [-100, 2, 1]])
    logits = torch.zeros(2, 3, 5)
    logits[0, 0, 0] = logits[0, 1, 0] = 2.0  # right, wrong; the two others are even, and the first of equals is 0

    def run(batch: Batch) -> Tensor:
        return logits

    found = quality(run, [{"input_ids": labels, "labels": labels}], num_classes=3)
    z = torch.tensor([2.0, 0.0, 0.0]).logsumexp(0)
    expected = ((z - 2) + z + 2 * torch.tensor(3.0).log()) / 4
    assert found["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert found["accuracy"] == 0.25


def test_a_teacher_whose_config_has_no_padding_gets_that_of_the_data(tmp_path: Path) -> None:
    labels = ("a", "b")
    teacher = classifier("llama", labels=labels, pad_token_id=None)
    for name, model in (("teacher", teacher), ("student", classifier("bert", labels=labels))):
        save(model, tmp_path / name)
    texts = [" ".join("w5" for _ in range(2 + i % 3)) for i in range(12)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"{text},{labels[i % 2]}" for i, text in enumerate(texts)))
    given = {"train_data": str(tmp_path / "rows.csv"), "tokenizer": str(tmp_path / "teacher"), "max_length": 16}
    data = ClassificationData(**given, val_fraction=0.5, batch_size=4)
    data.setup()
    found, _ = costs.candidates(pair.module(tmp_path, teacher=OnlineTeacher(str(tmp_path / "teacher"))), data, tmp_path, {})
    batch = next(iter(data.val_dataloader()))
    assert found["teacher"].run(batch).shape == (4, 2)
