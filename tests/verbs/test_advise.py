"""`advise`, as a person meets it: from the question to a command that runs."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from distill.advise import blocks, model
from distill.cli import main
from tests import models
from tests.advise.teachers import LLAMA, folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher; measurements are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blocks, "EXPORTS", ("torchao:int8", "torchao:int4"))
    monkeypatch.setattr(blocks, "ROUNDS", 3)
    monkeypatch.setattr(model, "SECONDS", 0.05)
    return tmp_path


def advise(*args: str) -> int:
    return main(["advise", "--length=16", *args])


def test_from_the_question_to_an_export_and_a_step_of_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    teacher = models.causal_lm(**sizes, num_key_value_heads=2, head_dim=16)
    for weight in teacher.parameters():
        weight.data *= 0.25 if weight.ndim == 2 else 1  # quiet enough for 4 bits
    models.save(teacher, here / "teacher")
    (here / "data").mkdir()
    rows = [json.dumps({"text": " ".join(f"w{3 + (i * j) % 37}" for j in range(20))}) for i in range(1, 60)]
    (here / "data/train.jsonl").write_text("\n".join(rows))
    (here / "texts.txt").write_text(" ".join(f"w{3 + i * i % 37}" for i in range(3000)))
    capsys.readouterr()  # of what libraries say when a model is saved
    assert advise("--teacher=teacher", "--target=size", "--budget=6 %", "--data=texts.txt", "--out=a.json", "--tokens=1000") == 0
    printed = capsys.readouterr().out
    found = json.loads((here / "a.json").read_text())
    assert found["leaf"] == "combine"
    assert [step["form"]["kind"] for step in found["steps"]] == ["ptq", "combine"]
    whole = (here / "teacher" / "model.safetensors").stat().st_size
    assert found["budget"]["limit"] == pytest.approx(0.06 * whole)
    assert found["steps"][-1]["form"]["bytes"]["value"] <= 0.06 * whole
    assert found["forms"][0]["bytes"] == {"value": whole, "how": "measured", "basis": "its files"}
    assert [line for line in printed.splitlines() if len(line) > 125 and "$ " not in line] == []
    for part in (found["headline"][:40], "What it can become", "Not taken", "two layers of it", "NaN"):
        assert (part in printed) == (part != "NaN")

    commands = [shlex.split(command)[2:] for step in found["steps"] for command in step["commands"]]
    assert main(commands[0]) == 0  # the export of the teacher as it is
    assert any((here / "runs/a-as-it-is").iterdir())
    assert main(["fit", *commands[1]]) == 0  # --dry-run: one step of the student that was advised
    assert "One real forward and backward: fine" in capsys.readouterr().out
    document = yaml.safe_load((here / "a.yaml").read_text())
    assert document["model"]["student"]["class_path"] == "Shrunk"
    assert advise("--teacher=teacher", "--target=size", "--budget=20 %", "--out=a.json") == 2
    assert "a.yaml exists, and you may have changed it" in capsys.readouterr().err


def test_a_classifier_that_is_within_the_budget(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert advise("--teacher", folder(here / "t", "bert"), "--target=latency", "--budget=10 s", "--tflops=989", "--gpus=8") == 0
    printed = capsys.readouterr().out
    assert "The teacher is within 10,000 ms as it is: there is nothing to do." in printed
    assert "8 × 989 TFLOP/s × 35%" in printed
    assert not (here / "advice.yaml").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--target=size", "--budget=1 MB"], "these keys have no value: teacher; see advise --help"),
        (["--teacher=no/such/folder", "--target=size", "--budget=1 MB"], "--teacher: no folder 'no/such/folder' here; give the path"),
        (["--teacher=t", "--target=speed", "--budget=1 MB"], "must be one of size, latency, quality; got 'speed'"),
        (["--teacher=t", "--target=size", "--budgte=1 MB"], "does not accept option 'budgte'. Did you mean 'budget'?"),
        (["--teacher=t", "--target=size", "--budget=1"], "--budget: '1' has no unit of size"),
        (["--teacher=t", "--target=size", "--budget=1 MB", "--hours=-1"], "--hours must be above 0, got -1"),
        (["--teacher=t", "--target=size", "--budget=1 MB", "--hours=many"], "hours"),
        (["--teacher=t", "--target=size", "--budget=1 MB", "--data=x.txt"], "--data: there is no file 'x.txt'"),
        (["--teacher=t", "--target=size", "--budget=1 MB", "--gpus=0"], "--gpus at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    folder(here / "t")
    assert advise(*args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_help_is_one_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["advise", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 50
    assert all(
        f"--{name}" in printed for name in ("teacher", "target", "budget", "task", "hours", "tokens", "length", "data", "tflops", "out")
    )
