import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.report.page.blocks import Fold, Grid, Missing
from distill.report.sections.provenance import Provenance, again
from tests.report import made as runs


def test_hashes_files_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = runs.evidence(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"x" * 3)
    for name in (".lock", "report.json", "report_rows.npz"):
        (tmp_path / "run" / name).write_bytes(b"x")
    given = replace(given, config={**given.config, "data": {"train_data": str(tmp_path / "x.jsonl"), "url": "http://node1:80/a"}})
    found = json.loads(json.dumps(Provenance().figures(given), allow_nan=False))
    assert found["code"] == {**runs.CODE, "noted": "by the run"}
    assert found["config"]["data"] == {"train_data": "x.jsonl", "url": "http://…/a"}
    weights = found["weights"]
    assert weights["teacher"] != weights["student distilled"]
    left = {each["name"]: each["bytes"] for each in found["left"]}
    assert set(left) == {"teacher/", "student distilled/", "metrics.jsonl"}
    assert left["metrics.jsonl"] == 3
    assert left["teacher/"] == sum(file.stat().st_size for file in (tmp_path / "run" / "teacher").iterdir())
    assert found["student"] == "student distilled"
    assert str(tmp_path) not in json.dumps(found)


def test_the_hash_is_of_the_weights_on_disk(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path)
    on_disk = load_file(tmp_path / "teacher" / "model.safetensors")
    model = given.subjects["teacher"].model
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = [on_disk.get(name, tensor) for name, tensor in named.items()]
    sums = [int(t.detach().contiguous().numpy().view(np.int32 if t.element_size() == 4 else np.int64).sum(dtype=np.int64)) for t in tensors]
    assert Provenance().figures(given)["weights"]["teacher"] == hashlib.sha256(np.array(sums, np.int64).tobytes()).hexdigest()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert Provenance().figures(given)["weights"]["teacher"] != hashlib.sha256(np.array(sums, np.int64).tobytes()).hexdigest()


def test_the_command_runs_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(again({"seed_everything": 3, "ckpt_path": "last"}, tmp_path / "runs" / "a b"))
    assert words[:2] == ["python", "train.py"]
    assert words[2:] == ["--config", "runs/a b/config.yaml", "--name", "a b-again", "--seed_everything", "3", "--ckpt_path", "null"]
    assert again({"seed_everything": True}, tmp_path / "r").endswith("--name r-again")


def test_what_is_shown(tmp_path: Path) -> None:
    given = runs.evidence(tmp_path, absent={"teacher": "the teacher is served"})
    given = replace(given, subjects={"student distilled": given.subjects["student distilled"]})
    found = json.loads(json.dumps(Provenance().figures(given)))
    note, *blocks = Provenance().blocks(found)
    assert "distill 9.9, commit `abc +` with changes, with seed 3" in note.text
    assert [block.why for block in blocks if isinstance(block, Missing)] == ["the teacher is served"]
    folds = {block.summary: block.text for block in blocks if isinstance(block, Fold)}
    assert yaml.safe_load(folds["The resolved configuration"]) == given.config
    hashes = dict(next(block for block in blocks if isinstance(block, Grid)).rows)
    assert hashes["training data"] == "d" * 16
    assert hashes["weights, student distilled"] == found["weights"]["student distilled"]


def test_a_run_that_noted_nothing_of_itself(tmp_path: Path) -> None:
    found = Provenance().figures(runs.evidence(tmp_path, run={}))
    assert found["code"]["noted"] == "now"
    assert found["code"]["data"] == "d" * 16
    assert "the run noted nothing" in Provenance().blocks(found)[0].text
