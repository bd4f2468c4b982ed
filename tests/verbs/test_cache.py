"""`cache`, as a person meets it: the store is written once, and the same YAML then trains without a teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import main
from tests import pair
from tests.test_command import ROOT, config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    write()
    return tmp_path


def write(source: dict[str, Any] | None = None, name: str = "kd.yaml", **kept: Any) -> None:
    given = config()
    online = given["model"]["teacher"]
    online["init_args"] |= source or {}
    given["model"]["teacher"] = {
        "class_path": "CachedTeacher",
        "init_args": {"store": "runs/store", "temperature": 2.0, **kept, "source": online},
    }
    Path(name).write_text(yaml.safe_dump(given))


@pytest.mark.slow
def test_written_once_it_trains_and_reports(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "kd.yaml", "--name=a", "--baseline=true"]) == 2
    said = capsys.readouterr()
    assert (
        "there is no store 'runs/store'; write it first with `python train.py cache --config kd.yaml --name=a --baseline=true`" in said.err
    )
    assert not Path("runs").exists(), "said before anything is trained, the baseline too"
    hidden = "--model.losses.hidden=HiddenMSE", "--model.balancer=FixedWeights"
    assert main(["cache", "--config", "kd.yaml", "--shard_rows=16", "--batch=3", *hidden]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    rows = json.loads(Path("runs/store/header.json").read_text())["rows"]
    size = sum(path.stat().st_size for path in Path("runs/store").glob("shard-*.bin"))
    shards = [json.loads(path.read_text()) for path in Path("runs/store").glob("shard-*.json")]
    positions = sum(shard["positions"] for shard in shards)
    for part in (
        f"rows {rows}",
        f"positions with a label {positions}",
        f"in {len(shards)} shards, {len(shards)} of them written now",
        f"bytes per position {size / positions:.1f}, with hidden states of 48 values",
        "time",
    ):
        assert part in printed
    assert main(["fit", "--config", "kd.yaml", "--name=a", *hidden]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    of_teacher = "8,568 parameters · 0.0 MB float32 · 3.3× the student"
    assert f"teacher, from the store runs/store · {of_teacher} · none of it in memory, {size / 1e6:.1f} MB on disk" in printed
    assert "KL and agreement are not measured: the teacher is teacher, from the store runs/store" in printed
    cached = json.loads(Path("runs/a/report.json").read_text())["models"]
    Path("online.yaml").write_text(yaml.safe_dump(config()))
    assert main(["fit", "--config", "online.yaml", "--name=b", *hidden]) == 0
    online = json.loads(Path("runs/b/report.json").read_text())["models"]
    for figure in ("count", "loss", "accuracy", "parameters", "perplexity"):
        assert cached["teacher"][figure] == pytest.approx(online["teacher"][figure], rel=1e-6)
    assert "kl" not in cached["teacher"] | cached["student distilled"]
    distilled = cached["student distilled"]
    assert distilled["retention"] == pytest.approx(distilled["accuracy"] / online["teacher"]["accuracy"])
    assert distilled["loss"] == pytest.approx(online["student distilled"]["loss"], rel=0.05)


def test_whole_or_damaged_it_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--config", "kd.yaml", "--verify"]) == 2
    assert "there is no store 'runs/store'" in capsys.readouterr().err
    other = ["--store=elsewhere/store", "--shard_rows=16"]
    assert main(["cache", "--config", "kd.yaml", *other]) == 0
    assert not Path("runs/store").exists()
    capsys.readouterr()
    assert main(["cache", "--config", "kd.yaml", *other, "--verify"]) == 0
    assert "The store elsewhere/store is whole: 4 shards with 64 rows of teacher" in capsys.readouterr().out
    assert main(["cache", "--config", "kd.yaml", *other]) == 0
    assert "is whole: all its 4 shards are there, nothing to do" in capsys.readouterr().out
    path = Path("elsewhere/store/shard-00002.bin")
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert main(["cache", "--config", "kd.yaml", *other, "--verify"]) == 2
    assert "shard-00002.bin' is damaged" in capsys.readouterr().err
    assert path.read_bytes() != good, "looking changes nothing"
    assert main(["cache", "--config", "kd.yaml", *other]) == 0
    assert path.read_bytes() == good
    assert main(["validate", "--config", "kd.yaml", "--model.teacher.store=elsewhere/store", "--name=v"]) == 0


def test_a_teacher_that_its_recipe_makes_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("teacher").rename("tokens")
    recipe = config()
    del recipe["model"]["teacher"], recipe["model"]["balancer"]
    recipe["model"]["losses"] = {"ce": "CrossEntropy"}
    recipe["data"]["init_args"]["tokenizer"] = "tokens"
    recipe |= {"name": "teacher"}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    write({"model": "runs/teacher/student", "recipe": "recipe.yaml"})
    assert main(["cache", "--config", "kd.yaml", "--data.tokenizer=tokens"]) == 0
    assert "training it first, once, with" in capsys.readouterr().out
    assert main(["fit", "--config", "kd.yaml", "--data.tokenizer=tokens", "--name=a", "--trainer.max_steps=1"]) == 0


def test_what_is_no_cached_teacher(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("online.yaml").write_text(yaml.safe_dump(config()))
    assert main(["cache", "--config", "online.yaml"]) == 2
    assert "model.teacher is OnlineTeacher, of which nothing is kept; set class_path: CachedTeacher" in capsys.readouterr().err
    assert main(["cache", "--config", "kd.yaml", "--model.teacher.source=null"]) == 2
    assert "model.teacher.source is missing: there is no teacher to ask" in capsys.readouterr().err


def test_kd_llama_cached_differs_from_kd_llama_in_its_teacher_alone() -> None:
    online, cached = (yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("kd_llama.yaml", "kd_llama_cached.yaml"))
    assert cached["model"].pop("teacher")["init_args"]["source"] == online["model"].pop("teacher")
    assert cached == online
