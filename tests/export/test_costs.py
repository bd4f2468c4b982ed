"""The verb `cost` on a run with an export: what it says of quality and size is what is known otherwise."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from distill.cli import main
from distill.export.costs import quality
from distill.types import Batch
from tests import pair
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


def test_mistakes_are_said(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost(run, monkeypatch, "--rounds", "1") == 2
    assert cost(run, monkeypatch, "--batch", "4000") == 2
    assert cost(run, monkeypatch, "--name", "nothing") == 2
    said = capsys.readouterr().err
    for part in ("rounds must be at least 2", "batch is 4000, but a batch of validation rows has", "there is no student in"):
        assert part in said


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
