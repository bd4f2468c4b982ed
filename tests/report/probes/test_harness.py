import json
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from distill.report.evidence import NotMeasured
from distill.report.probes.harness import Harness, Score, difference, interval
from tests import models

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {max_gen_toks: 3, do_sample: false, until: ["[END]"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "caches" / "datasets")


def _says(model: Any, question: str, tokens: int) -> str:
    ids = models.tokenizer()(question)["input_ids"]
    size = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:  # the end
            break
    return models.tokenizer().decode(ids[size:], skip_special_tokens=True)


def _log_likelihood(model: Any, question: str, choice: str) -> float:
    words = models.tokenizer()
    before, after = words(question)["input_ids"], words(choice)["input_ids"]
    logp = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(logp[len(before) - 1 + i, token].item() for i, token in enumerate(after))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    words = lambda n: " ".join(f"w{rng.randint(3, 39)}" for _ in range(n))
    asked = [{"question": words(4), "choices": [words(1 + i % 3) for i in range(3)], "answer": rng.randint(0, 2)} for _ in range(16)]
    teacher = models.causal_lm()
    return [{**row, "written": _says(teacher, row["question"], 3) if i % 2 else "w3"} for i, row in enumerate(asked)]


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    path = tmp_path_factory.mktemp("tasks")
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (path / f"{name}.yaml").write_text(text.replace("FILE", str(path / "rows.jsonl")))
    return path


def test_a_choice_is_the_likeliest_text(folder: Path, rows: list[dict[str, Any]]):
    harness = Harness(str(folder))
    assert harness.names == ["tiny_choice", "tiny_write"]
    model, words = models.causal_lm().train(), models.tokenizer()
    words.pad_token = None
    python, torchs, numpys = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    scores = harness.scores("tiny_choice", model, words)["tiny_choice"]
    assert model.training
    assert words.pad_token is None
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torchs)
    assert np.random.get_state()[1].tolist() == numpys
    model.eval()
    right = {}
    for i, row in enumerate(rows):
        found = [_log_likelihood(model, row["question"], choice) for choice in row["choices"]]
        right[i] = float(np.argmax(found) == row["answer"])
    assert scores["acc"].examples == right
    assert scores["acc"].value == pytest.approx(np.mean([*right.values()]))
    assert scores["acc"].error == pytest.approx(np.std([*right.values()], ddof=1) / 4)
    assert 0 < scores["acc"].value < 1


def test_what_is_written_is_compared_to_the_letter(folder: Path):
    harness = Harness([str(folder)], limit=6)
    scores = harness.scores("tiny_write", models.causal_lm(), models.tokenizer())["tiny_write"]
    assert scores["exact_match"].examples == {i: float(i % 2) for i in range(6)}


def test_a_task_whose_data_is_not_here_says_so(folder: Path, tmp_path: Path):
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("FILE", str(tmp_path / "nothing.jsonl")))
    harness = Harness(str(tmp_path))
    with pytest.raises(NotMeasured, match=r"lm_eval could not run it: FileNotFoundError"):
        harness.check("tiny_choice")
    with pytest.raises(NotMeasured, match=r"lm_eval could not run it: FileNotFoundError"):
        harness.scores("tiny_choice", models.causal_lm(), models.tokenizer())


def test_a_folder_without_tasks_says_so(folder: Path, tmp_path: Path):
    with pytest.raises(NotMeasured, match="no YAML in"):
        Harness(str(tmp_path))


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(NotMeasured, match=r"pip install 'lm_eval>=0\.4\.13'"):
        Harness(["arc_easy"])


def test_intervals_are_of_examples_where_there_are_some():
    rights = np.random.default_rng(0).random(300).round()
    score = Score(rights.mean(), 0.5, dict(enumerate(rights)))
    found = interval(score)
    half = 1.96 * rights.std() / 300**0.5
    assert [found["low"], found["high"]] == pytest.approx([rights.mean() - half, rights.mean() + half], abs=0.008)
    assert interval(Score(0.5, 0.1)) == pytest.approx({"value": 0.5, "low": 0.5 - 0.196, "high": 0.5 + 0.196})
    assert interval(Score(12.5, None)) == 12.5
    assert interval(Score(1.0, 0.0, dict.fromkeys(range(8), 1.0)))["low"] == pytest.approx(0.025 ** (1 / 8))


def test_differences_are_paired_by_example():
    rights = np.random.default_rng(0).random(300).round()
    teacher = Score(rights.mean(), 0.0, dict(enumerate(rights)))
    shuffled = Score(rights.mean(), 0.0, dict(reversed([*enumerate(rights)])))
    reach = 1 - 0.025 ** (1 / 300)  # not paired it would be 0.08; that no example differs does not say that none would
    assert difference(shuffled, teacher) == pytest.approx({"value": 0.0, "low": -reach, "high": reach})
    fewer = Score(rights[1:].mean(), 0.0, dict(enumerate(rights[1:])))
    assert "missing" in difference(fewer, teacher)
    worse = Score(0.0, 0.0, dict.fromkeys(range(300), 0.0))
    assert difference(worse, teacher)["value"] == pytest.approx(-rights.mean())
    assert difference(worse, teacher)["high"] < -0.3
