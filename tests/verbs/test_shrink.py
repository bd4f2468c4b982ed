"""`shrink`, as a person meets it: a folder that stock transformers loads, and how much smaller it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cli import main
from distill.compress.factors import shapes
from tests import pair
from tests.test_command import config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher and data."""
    monkeypatch.chdir(tmp_path)
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    return tmp_path


def write(student: dict[str, Any], **teacher: Any) -> None:
    given = config()
    given["model"]["student"] = student
    given["model"]["teacher"]["init_args"] |= teacher
    Path("kd.yaml").write_text(yaml.safe_dump(given))


SHRUNK = {"class_path": "Shrunk", "init_args": {"model": "teacher", "layers": [1], "intermediate_size": 16}}


def test_it_writes_the_student_and_its_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"class_path": "LowRank", "init_args": {"base": SHRUNK, "rank": 3, "activation_aware": True}})
    assert main(["shrink", "--config", "kd.yaml", "--out=small"]) == 0
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("small", "teacher"))
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (1, 16)
    assert set(shapes(model).values()) == {3}
    assert torch.equal(model.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained("small").get_vocab() == AutoTokenizer.from_pretrained("teacher").get_vocab()
    printed = capsys.readouterr().out
    for part in (f"{teacher.num_parameters():,} parameters", f"{model.num_parameters():,} parameters", "The student is in small"):
        assert part in printed
    assert main(["shrink", "--config", "kd.yaml", "--out=small"]) == 2
    assert "the folder small exists; give --out another one" in capsys.readouterr().err


def test_a_student_that_cuts_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(config()["model"]["student"])
    assert main(["shrink", "--config", "kd.yaml"]) == 2
    assert "model.student is FromConfig, which cuts nothing; take Shrunk or LowRank" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_student_of_a_teacher_that_its_recipe_makes_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("teacher").rename("tokens")
    source = "runs/teacher/student"
    recipe = config()
    del recipe["model"]["teacher"], recipe["model"]["balancer"]
    recipe["model"]["losses"] = {"ce": "CrossEntropy"}
    recipe["data"]["init_args"]["tokenizer"] = "tokens"
    recipe |= {"name": "teacher"}
    recipe["model"]["student"]["init_args"]["config"]["num_hidden_layers"] = 3
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    write({"class_path": "Shrunk", "init_args": {"model": source, "layers": "every_other"}}, model=source, recipe="recipe.yaml")
    arguments = ["fit", "--config", "kd.yaml", "--name=a", "--data.tokenizer=tokens", "--trainer.max_steps=1"]
    assert main([*arguments, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "recipe.yaml would make it first" in said.out
    assert f"there is no folder '{source}' to cut the student from; a teacher's recipe makes it first, but not for a --dry-run" in said.err
    assert main(arguments) == 0
    assert "layers 0, 2 · hidden 16" in " ".join(capsys.readouterr().out.split())
    assert AutoModelForCausalLM.from_pretrained("runs/a/student").config.num_hidden_layers == 2
