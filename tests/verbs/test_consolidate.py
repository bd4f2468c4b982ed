"""The student of a checkpoint is that of the run's end, to the bit, whatever strategy has written it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill import checkpoints
from distill.cli import main
from distill.compress.base import Compression
from distill.tasks import Task
from tests import pair
from tests.ranks import run_ranks
from tests.test_command import config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher, data and `kd.yaml` of three steps."""
    monkeypatch.chdir(tmp_path)
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    given = config() | {"save_every": 2, "watchdog_s": 0}
    given["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(given))
    return tmp_path


def fit(*args: str) -> int:
    return main(["fit", "--config", "kd.yaml", "--name=a", *args])


def consolidate(*args: str) -> int:
    return main(["consolidate", "--config", "runs/a/config.yaml", *args])


def same(one: Path, other: Path) -> bool:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_last_checkpoint_holds_the_student_of_the_end(strategy: str, here: Path) -> None:
    assert run_ranks(fit, 2, f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.accelerator=cpu") == [0, 0]
    assert consolidate("--ckpt_path=last", "--out=last") == 0
    assert same(here / "last", here / "runs" / "a" / "student")
    if strategy == "fsdp2":
        two = here / "runs" / "a" / "checkpoints" / checkpoints.name_of(2)
        assert consolidate(f"--ckpt_path={two}") == 0
        assert not same(here / "runs" / "a" / "student-step-00000002", here / "last"), "in mid-run they were others"
    assert {file.name for file in (here / "last").iterdir()} == {file.name for file in (here / "runs" / "a" / "student").iterdir()}
    assert AutoModelForCausalLM.from_pretrained(here / "last").dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(here / "last")) == len(AutoTokenizer.from_pretrained(here / "teacher"))


LORA = {"class_path": "LoRA", "init_args": {"base": {"class_path": "Pretrained", "init_args": {"model": "teacher"}}, "r": 2}}
TRAINABLE = {"class_path": "DeepSpeedCPU", "init_args": {"stage": 3, "exclude_frozen_parameters": True}}


@pytest.mark.slow
def test_lora_is_merged_into_the_base_that_the_checkpoint_lacks(here: Path) -> None:
    given = yaml.safe_load((here / "kd.yaml").read_text())
    given["model"]["student"] = LORA
    given["trainer"] |= {"strategy": TRAINABLE, "devices": 2, "accelerator": "cpu"}
    (here / "kd.yaml").write_text(yaml.safe_dump(given))
    assert run_ranks(fit, 2) == [0, 0]
    assert consolidate("--out=last") == 0
    assert same(here / "last", here / "runs" / "a" / "student")


class Scale(nn.Module):
    """Multiplies by what is trained along."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.by


class Scaled(Compression):
    """A compression with a parameter in the student, and a state in the callback that its end needs."""

    def __init__(self) -> None:
        self.steps = 0

    def prepare(self, student: PreTrainedModel, task: Task) -> None:
        parametrize.register_parametrization(student.model.layers[0].mlp.up_proj, "weight", Scale(), unsafe=True)

    def finish(self, student: PreTrainedModel) -> PreTrainedModel:
        parametrize.remove_parametrizations(student.model.layers[0].mlp.up_proj, "weight")
        student.model.layers[0].mlp.up_proj.weight.data.add_(self.steps)
        return student

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class Elsewhere(pair.pl.Callback):
    """A callback that can be made only where a run is."""

    def __init__(self) -> None:
        if "TRAINING" not in os.environ:
            raise RuntimeError("only in a job")


def test_compressions_are_carried_out_and_other_callbacks_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = yaml.safe_load((here / "kd.yaml").read_text())
    given["trainer"]["callbacks"] = [{"class_path": f"{__name__}.{name}"} for name in ("Elsewhere", "Scaled")]
    (here / "kd.yaml").write_text(yaml.safe_dump(given))
    with monkeypatch.context() as job:
        job.setenv("TRAINING", "1")
        assert fit() == 0
    assert consolidate("--out=last") == 0
    assert same(here / "last", here / "runs" / "a" / "student")


@pytest.mark.parametrize("as_list", [True, False])
def test_bits_of_a_budget_are_those_of_the_checkpoint(as_list: bool, here: Path) -> None:
    """Measured when training began, and not again; `callbacks` may be one that stands without a list."""
    given = yaml.safe_load((here / "kd.yaml").read_text())
    init = {"scheme": "int4", "group_size": 8, "budget": 3.2, "choices": [2, 4, 8]}
    one = {"class_path": "QuantizationAwareTraining", "init_args": init}
    given["trainer"]["callbacks"] = [one] if as_list else one
    (here / "kd.yaml").write_text(yaml.safe_dump(given))
    assert fit() == 0
    assert consolidate("--out=last") == 0
    assert same(here / "last", here / "runs" / "a" / "student")
    kept = [
        json.loads((folder / "config.json").read_text())["distill_quantization"]
        for folder in (here / "last", here / "runs" / "a" / "student")
    ]
    assert kept[0] == kept[1]
    assert len({how["bits"] for how in kept[0]["layers"].values()}) > 1, "or this says nothing"


def test_what_cannot_be_is_a_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps=2") == 0
    (here / "there").mkdir()
    assert consolidate("--out=there") == 2
    assert "error: the folder there exists; give --out another one" in capsys.readouterr().err
    assert consolidate("--model.student.init_args.config.hidden_size=8", "--out=last") == 2
    assert "is of another student: Error(s) in loading state_dict for LlamaForCausalLM: size mismatch" in capsys.readouterr().err
    checkpoint = here / "runs" / "a" / "checkpoints" / checkpoints.name_of(2)
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    assert consolidate(f"--ckpt_path={checkpoint}", "--out=last") == 2
    assert f"{checkpoint} is damaged: {checkpoint.name} has other bytes than were written" in capsys.readouterr().err
    assert not (here / "last").exists()
    assert json.loads((here / "runs" / "a" / "report.json").read_text())["steps"] == 2
