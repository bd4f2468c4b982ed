"""The verb, as a person meets it, after a real run."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.cli import main
from distill.compress.ptq import ptq
from tests import pair
from tests.test_command import config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `runs/a`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pair.teacher_folder(folder / "teacher")
        pair.prompts(folder / "prompts.jsonl", 80)
        (folder / "kd.yaml").write_text(yaml.safe_dump(config()))
        assert main(["fit", "--config", "kd.yaml", "--name", "a", "--trainer.max_steps=2"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*args: str) -> int:
    return main(["export", "--config", "runs/a/config.yaml", *args])


def test_a_run_is_exported_beside_its_student(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zstandard", reason="packing needs zstandard")
    assert export("--format", "[hf,packed:bf16]", "--rows=8") == 0
    printed = capsys.readouterr().out
    assert "hf-fp32" in printed
    assert "packed-bf16" in printed
    saved, student = (load_file(here / "runs" / "a" / name / "model.safetensors") for name in ("export/hf-fp32", "student"))
    assert saved.keys() == student.keys()
    assert all(torch.equal(saved[name], student[name]) for name in saved)
    assert sorted(folder.name for folder in (here / "runs" / "a").iterdir()).count("export") == 1


def test_ptq_stands_beside_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    assert export("--format=hf", "--out=out", "--ptq=int2", "--group_size=16", "--rows=8") == 0
    assert "quantised, not exported" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained("out/hf-fp32")
    expected = ptq(AutoModelForCausalLM.from_pretrained("runs/a/student"), "int2", 16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    shutil.move("out/hf-fp32", "again")
    assert export("--format=hf", "--student=again", "--ptq=int4", "--out=out") == 2
    assert "was quantised in training already; leave --ptq out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "place"), [(["--ptq=int8"], "export-ptq-int8"), (["--ptq=int3", "--group_size=16"], "export-ptq-int3-16")]
)
def test_ptq_leaves_the_export_of_the_student_alone(here: Path, args: list[str], place: str) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    assert export("--format=hf", "--rows=8") == 0
    plain = (here / "runs/a/export/hf-fp32/model.safetensors").read_bytes()
    assert export("--format=hf", "--rows=8", *args) == 0
    assert (here / "runs/a/export/hf-fp32/model.safetensors").read_bytes() == plain
    assert (here / "runs/a" / place / "hf-fp32/model.safetensors").read_bytes() != plain


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--format=onyx"], "there is no 'onyx'"),
        (["--format=hf", "--precision=int3"], "hf has no 'int3'; it has fp32, bf16"),
        (["--formt=hf"], "Did you mean 'format'?"),
        (["--format=hf", "--ptq=int5"], "ptq"),
        (["--format=hf", "--group_size=16"], "group_size: 16 is for --ptq, and there is none"),
        (["--format=hf", "--rows=0"], "rows"),
        (["--format=hf", "--student=nowhere"], "there is no student in 'nowhere'"),
        (["--format=hf", "--name=other"], "train it first"),
        (["--format=gguf"], "the tokenizer is WordLevel, and only byte-level BPE is known here"),
        (["--format=hf:bf16", "--tolerance=0"], "hf-bf16: what was written and loaded again is not the student"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    if "gguf" in args[0]:
        pytest.importorskip("gguf", reason="the format needs gguf")
    assert export(*args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list((here / "runs" / "a").glob("export/*"))
    assert not list((here / "runs" / "a").glob("export/.*"))
