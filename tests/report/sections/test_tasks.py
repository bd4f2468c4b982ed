import json
from typing import Any

import datasets
import pytest
import torch

from distill.report.evidence import NotMeasured
from distill.report.page.blocks import Grid, Missing, Note, Picture
from distill.report.probes import harness
from distill.report.probes.harness import Score
from distill.report.sections import all_sections, tasks
from distill.report.sections.tasks import Tasks
from distill.tasks import SequenceClassification
from tests import models
from tests.report.disturbed import evidence, rows, texts
from tests.report.probes.test_harness import CHOICE


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "caches" / "datasets")


def _scores(rights: list[float]) -> dict[str, dict[str, Score]]:
    value = sum(rights) / len(rights)
    return {"choice": {"acc": Score(value, 0.1, dict(enumerate(rights))), "acc_norm": Score(value, 0.1, dict(enumerate(rights)))}}


class _Harness:
    """In place of the real one: the teacher is right at every second example, the student at every fourth; one task has no data."""

    def __init__(self, asked: Any, limit: Any) -> None:
        self.names, self.asked, self.limit = ["choice", "gone"], asked, limit

    def check(self, name: str) -> None:
        if name == "gone":
            raise NotMeasured("no network")

    def scores(self, name: str, model: Any, tokenizer: Any) -> Any:
        if model.who == "S before":
            raise NotMeasured("out of memory")
        return _scores([float(i % (2 if model.who == "teacher" else 4) == 0) for i in range(200)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(harness, "Harness", _Harness)
    named = {}
    for name in ("teacher", "S before", "student"):
        named[name] = models.causal_lm()
        named[name].who = name
    given = evidence({**named, "onnx": None}, rows(), config={"tasks": ["choice", "gone"], "task_limit": 200})
    return json.loads(json.dumps(Tasks().figures(given), allow_nan=False))


def test_it_is_found_in_its_place():
    (section,) = [each for each in all_sections() if isinstance(each, Tasks)]
    assert (section.name, section.order) == ("tasks", 15)


def test_benchmarks_are_compared_example_by_example(measured: dict[str, Any]):
    found = measured["benchmarks"]["tasks"]["choice"]["metrics"]["acc"]
    assert found["models"]["teacher"]["value"] == 0.5
    assert found["models"]["student"]["value"] == 0.25
    assert found["difference"]["value"] == -0.25
    assert found["difference"]["high"] < -0.15
    assert found["examples"] == 200
    assert measured["benchmarks"]["tasks"]["gone"] == {"missing": "no network"}
    assert measured["benchmarks"]["tasks"]["choice"]["failed"] == {"S before": "out of memory"}
    assert "missing" in measured["answers"]


def test_the_page_says_where_the_student_is_behind(measured: dict[str, Any]):
    note, picture, grid, *missing = Tasks().blocks(measured)
    assert note == Note(
        "The student is behind its teacher by more than chance; it is furthest behind at choice, acc_norm: 25.0 %, its teacher 50.0 %.",
        "warning",
    )
    assert isinstance(picture, Picture)
    assert "choice, acc_norm -25.0 points" in picture.alt
    assert isinstance(grid, Grid)
    assert grid.head == ["", "teacher", "student", "student − teacher, points", "examples"]
    assert [row[0] for row in grid.rows] == ["choice, acc", "choice, acc_norm"]
    assert grid.rows[0][3].startswith("-25.0 (")
    assert "200 examples at most" in grid.caption
    assert Missing("gone", "no network") in missing
    assert Missing("choice, S before", "out of memory") in missing
    assert any(block.what == "exact match" for block in missing)


@pytest.mark.parametrize(("value", "half", "tone"), [(-0.02, 0.05, "plain"), (0.1, 0.05, "good"), (-0.2, 0.05, "warning")])
def test_the_sentence_follows_the_interval(value: float, half: float, tone: str):
    gap = {"value": value, "low": value - half, "high": value + half}
    models_of = {"teacher": 0.5, "S": {"value": 0.5 + value, "low": 0.0, "high": 1.0}}
    answers = {"models": models_of, "difference": gap, "examples": 32}
    figures = {"names": ["teacher", "S"], "student": "S", "benchmarks": {"missing": "none asked for"}, "answers": answers}
    note, *_ = Tasks().blocks(figures)
    assert note.tone == tone
    assert ("too few to rule out a gap of 7 points" in note.text) == (tone == "plain")


def test_scores_that_are_no_shares_are_shown_as_numbers():
    metric = {"models": {"teacher": 12.5, "S": 14.25}, "difference": {"missing": "nothing to pair"}, "examples": 0}
    figures = {
        "names": ["teacher", "S"],
        "student": "S",
        "benchmarks": {"limit": None, "tasks": {"wiki": {"metrics": {"word_perplexity": metric}, "failed": {}}}},
        "answers": {"missing": "no ####"},
    }
    note, grid, missing = Tasks().blocks(figures)
    assert "could be compared" in note.text
    assert grid.rows == [["wiki, word_perplexity", "12.500", "14.250", "", ""]]
    assert missing == Missing("exact match", "no ####")


def test_a_classifier_has_no_tasks():
    with pytest.raises(NotMeasured, match="language models"):
        Tasks().figures(evidence({"student": models.classifier()}, texts(), SequenceClassification()))


def test_where_nothing_is_asked_it_is_said_what_could_be():
    with pytest.raises(NotMeasured, match=r"set `tasks` to names .*No held-out completion gives an answer after ####"):
        Tasks().figures(evidence({"student": models.causal_lm()}, rows()))


class _Writes(torch.nn.Module):
    """Says the same whatever it is asked."""


def test_answers_are_right_to_the_digit(monkeypatch: pytest.MonkeyPatch):
    asked = [tasks.generate.Question([3, 4], str(i), 5, 1) for i in range(8)]
    teacher, student = _Writes(), _Writes()
    texts_of = {id(teacher): [f"so it is #### {i}.00" for i in range(8)], id(student): [f"it is {i % 2}" for i in range(8)]}
    monkeypatch.setattr(tasks.generate, "questions", lambda batches, tokenizer, max_length, count: asked[:count])
    monkeypatch.setattr(tasks.generate, "greedy", lambda model, *_: texts_of[id(model)])
    figures = Tasks().figures(evidence({"teacher": teacher, "student": student}, rows()))
    found = json.loads(json.dumps(figures, allow_nan=False))["answers"]
    assert found["models"]["teacher"] == pytest.approx({"value": 1.0, "low": 0.025 ** (1 / found["examples"]), "high": 1.0})
    assert found["models"]["student"]["value"] == 0.25
    assert found["difference"]["value"] == -0.75
    assert found["examples"] == 8
    note, _, grid, missing = Tasks().blocks(figures)
    assert note.text.startswith(
        "The student is behind its teacher by more than chance; it is furthest behind at answers after ####: 25.0 %"
    )
    assert grid.rows[0][0] == "answers after ####"
    assert missing.what == "benchmarks"


def test_held_out_rows_of_prompts_are_asked_for_real(monkeypatch: pytest.MonkeyPatch):
    """From rows to figures with nothing replaced but the words: w3 is the mark, w4 … are digits."""
    words = models.tokenizer()
    plain = words.decode
    say = lambda ids, **kw: " ".join(
        "####" if word == "w3" else str(int(word[1:]) % 10) if word[0] == "w" else word for word in plain(ids, **kw).split()
    )
    monkeypatch.setattr(words, "decode", say)
    monkeypatch.setattr(words, "batch_decode", lambda ids, **kw: [say(row, **kw) for row in ids])
    ids = torch.tensor([[5, 6, 7, 3, 8 + i, 1] for i in range(4)])
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "attention_mask": torch.ones_like(ids)}
    batch["labels"][:, :2] = batch["labels"][:, -1:] = -100
    given = evidence({"teacher": models.causal_lm(), "student": models.causal_lm(seed=1)}, [batch])
    given.data.tokenizer = words
    found = Tasks().figures(given)["answers"]
    assert found["examples"] == 4
    written = {}
    for name, subject in given.subjects.items():
        first = subject.model.generate(ids[:1, :3], max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=0)[0, 3:]
        said = tasks.final_answer(say(first, skip_special_tokens=True))
        written[name] = sum(str((8 + i) % 10) == said for i in range(4)) / 4
    assert {name: figure["value"] for name, figure in found["models"].items()} == written


def test_a_real_harness_gives_the_chapter_its_figures(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    asked = [{"question": f"w{5 + i}", "choices": ["w8", "w9"], "answer": i % 2} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("FILE", str(tmp_path / "rows.jsonl")))
    same = models.causal_lm()
    figures = Tasks().figures(evidence({"teacher": same, "student": same}, rows(), config={"tasks": str(tmp_path), "task_limit": 6}))
    found = figures["benchmarks"]["tasks"]["tiny_choice"]["metrics"]["acc"]
    assert found["examples"] == 6
    assert found["difference"]["value"] == 0.0
    assert found["difference"]["high"] == pytest.approx(1 - 0.025 ** (1 / 6))  # six examples do not say that two models are the same
