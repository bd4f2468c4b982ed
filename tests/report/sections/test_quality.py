import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss  # type: ignore[import-untyped]
from torch import Tensor

from distill.metrics.classes import per_class
from distill.report.evidence import Evidence
from distill.report.page.blocks import Block, Fold, Grid, Missing, Note, Picture
from distill.report.sections.quality import Quality
from tests.report.asked import evidence, saying

R, V = 40, 4


def random(seed: int, rows: int = R, length: int = 1, v: int = V) -> tuple[Tensor, Tensor]:
    """Logits and labels, of which about half are the likeliest."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, v, generator=rng)
    labels = torch.randint(v, (rows, length), generator=torch.Generator().manual_seed(0))
    return logits + torch.nn.functional.one_hot(labels, v) * 1.5, labels


def classifier(**changes: Any) -> Evidence:
    labels = random(0)[1]
    names = ("teacher", "student before", "student alone", "student distilled")
    return evidence({name: random(seed)[0] for seed, name in enumerate(names)}, labels, **changes)


def shown(figures: dict[str, Any]) -> list[Block]:
    """The blocks, from strict JSON as a page is made again from."""
    return Quality().blocks(json.loads(json.dumps(figures, allow_nan=False)))


def of(kind: type, blocks: list[Block]) -> list[Any]:
    return [block for block in blocks if isinstance(block, kind)]


def test_figures_are_those_of_scikit_learn() -> None:
    given = classifier()
    labels = given.observed.labels
    found = Quality().figures(given)
    teacher = random(0)[0][:, 0]
    for seed, name in enumerate(given.subjects):
        logits = random(seed)[0][:, 0]
        model = found["models"][name]
        accuracy = (logits.argmax(-1).numpy() == labels).mean()
        assert model["accuracy"]["value"] == pytest.approx(accuracy)
        assert model["accuracy"]["low"] < accuracy < model["accuracy"]["high"]
        assert model["loss"]["value"] == pytest.approx(log_loss(labels, logits.double().softmax(-1), labels=range(V)), rel=1e-6)
        assert "perplexity" not in model  # of a classifier
        if name != "teacher":
            assert model["retention"]["value"] == pytest.approx(accuracy / (teacher.argmax(-1).numpy() == labels).mean())
    top = random(3)[0][:, 0].argmax(-1).numpy()
    assert found["by_class"]["macro_f1"]["student distilled"]["value"] == pytest.approx(f1_score(labels, top, average="macro"))
    assert list(found["by_class"]["macro_f1"]) == list(given.subjects)
    assert list(found["by_class"]["classes"][0]["models"]) == ["teacher", "student distilled"]


def test_the_share_of_the_gap_is_paired() -> None:
    given = classifier()
    models = dict(given.observed.models)
    rng = np.random.default_rng(0)
    noise = rng.normal(5, 3, R)  # rows differ far more than models do
    nll = {"teacher": noise, "student alone": noise + rng.uniform(0.5, 1, R)}
    nll["student distilled"] = 0.25 * nll["student alone"] + 0.75 * nll["teacher"]
    models |= {name: replace(models[name], nll=values) for name, values in nll.items()}
    found = Quality().figures(replace(given, observed=replace(given.observed, models=models)))
    gap = found["gap_closed"]
    assert gap["from"] == "student alone"
    assert gap["loss"]["value"] == pytest.approx(0.75)
    assert gap["loss"]["low"] == pytest.approx(0.75)  # every position has gone as far: nothing is unsure
    assert gap["loss"]["high"] == pytest.approx(0.75)
    assert gap["loss"]["gained"]["value"] == pytest.approx(0.75 * (nll["student alone"] - noise).mean())


def right(share: float, labels: Tensor) -> Tensor:
    """Logits that are right on the first part of the rows."""
    wrong = torch.arange(len(labels))[:, None] >= round(share * len(labels))
    return saying((labels + wrong) % V, V)


def test_gap_in_accuracy_and_what_is_said() -> None:
    labels = random(0, rows=200)[1]
    shares = {"teacher": 0.9, "student alone": 0.5, "student distilled": 0.8}
    found = Quality().figures(evidence({name: right(share, labels) for name, share in shares.items()}, labels))
    assert found["gap_closed"]["accuracy"]["value"] == pytest.approx(0.3 / 0.4)
    assert found["models"]["student distilled"]["retention"]["value"] == pytest.approx(8 / 9)
    note, *_ = of(Note, shown(found))
    assert "80.0 %" in note.text
    assert "keeps 88.9 %" in note.text
    assert "closed 75 %" in note.text
    assert "a student trained without the teacher" in note.text
    assert note.tone == "good"


def test_a_student_no_better_than_alone_is_a_warning() -> None:
    labels = random(0, rows=200)[1]
    shares = {"teacher": 0.9, "student alone": 0.5, "student distilled": 0.5}
    blocks = shown(Quality().figures(evidence({name: right(share, labels) for name, share in shares.items()}, labels)))
    note, *_ = of(Note, blocks)
    assert note.tone == "warning"
    assert "not clearly better" in note.text


def test_a_teacher_that_did_harm_is_told_first() -> None:
    labels = random(0, rows=200)[1]
    shares = {"teacher": 0.6, "student alone": 0.9, "student distilled": 0.7}
    found = Quality().figures(evidence({name: right(share, labels) for name, share in shares.items()}, labels))
    assert found["over_alone"]["value"] == pytest.approx(-0.2)
    note, *_ = of(Note, shown(found))
    assert note.tone == "warning"
    assert "trained alone is right in 20.0 % (" in note.text
    assert note.text.endswith("the teacher did harm.")


def test_without_a_student_alone_the_gap_starts_before_training() -> None:
    labels = random(0, rows=200)[1]
    shares = {"teacher": 0.9, "student before": 0.25, "student distilled": 0.8}
    given = evidence(
        {name: right(share, labels) for name, share in shares.items()},
        labels,
        absent={"student alone": "none was trained; set baseline: true"},
    )
    found = Quality().figures(given)
    assert found["gap_closed"]["from"] == "student before"
    assert found["gap_closed"]["accuracy"]["value"] == pytest.approx(0.55 / 0.65)
    blocks = shown(found)
    assert "the student before training" in of(Note, blocks)[0].text
    assert Missing("student alone", "none was trained; set baseline: true") in blocks


def test_no_gap_where_the_teacher_is_not_better() -> None:
    labels = random(0, rows=200)[1]
    shares = {"teacher": 0.5, "student alone": 0.5, "student distilled": 0.6}
    found = Quality().figures(evidence({name: right(share, labels) for name, share in shares.items()}, labels))
    assert "no gap to close" in found["gap_closed"]["accuracy"]["missing"]
    assert any("gap" in block.what for block in of(Missing, shown(found)))


def test_without_a_teacher() -> None:
    logits, labels = random(1)
    found = Quality().figures(evidence({"student after": logits}, labels, absent={"teacher": "it is a store"}))
    assert "retention" not in found["models"]["student after"]
    assert "missing" in found["gap_closed"]
    blocks = shown(found)
    assert "no teacher to compare with" in of(Note, blocks)[0].text
    assert Missing("teacher", "it is a store") in blocks


def test_one_row_alone_says_why_it_has_no_interval() -> None:
    logits, labels = random(1, rows=1, length=8)
    found = Quality().figures(evidence({"teacher": logits, "student distilled": logits}, labels))
    assert "only one held-out row" in found["models"]["teacher"]["accuracy"]["missing"]
    assert of(Missing, shown(found))


def language(counts: list[int] | None = None) -> Evidence:
    labels = random(0, 30, 12)[1]
    return evidence(
        {name: random(seed, 30, 12)[0] for seed, name in enumerate(("teacher", "student alone", "student distilled"))}, labels, counts
    )


def test_a_language_model_has_perplexity_and_groups_of_tokens() -> None:
    given = language(counts=[500, 50, 5, 0])
    found = Quality().figures(given)
    columns, labels = given.observed.models["student distilled"], given.observed.labels
    loss = found["models"]["student distilled"]["loss"]
    assert found["models"]["student distilled"]["perplexity"] == pytest.approx({k: math.exp(v) for k, v in loss.items()})
    assert "by_class" not in found
    for label, name in enumerate(("head", "medium", "tail", "never seen")):
        here = labels == label
        group = found["groups"][name]
        assert (group["classes"], group["positions"]) == (1, here.sum())
        measured = group["models"]["student distilled"]
        assert len(np.unique(given.observed.rows[here])) >= 20
        assert measured["accuracy"]["value"] == pytest.approx((columns.top[here] == label).mean())
        assert measured["loss"]["value"] == pytest.approx(columns.nll[here].mean())
    (_, groups) = of(Grid, shown(found))
    assert len(groups.rows) == 4 * 3
    assert groups.rows[3][0] == "medium: 20 to 100 labels"


def test_a_perplexity_beyond_numbers_is_missing() -> None:
    given = language()
    models = dict(given.observed.models)
    models["teacher"] = replace(models["teacher"], nll=np.full(len(given.observed.labels), 1e5) + given.observed.labels)
    found = Quality().figures(replace(given, observed=replace(given.observed, models=models)))
    assert "larger than" in found["models"]["teacher"]["perplexity"]["missing"]
    assert shown(found)


def test_one_group_alone_is_not_shown_and_an_empty_one_is_named() -> None:
    assert len(of(Grid, shown(Quality().figures(language())))) == 1
    labels = torch.zeros(30, 12, dtype=torch.long)
    logits = {name: random(seed, 30, 12)[0] for seed, name in enumerate(("teacher", "student distilled"))}
    (_, groups) = of(Grid, shown(Quality().figures(evidence(logits, labels, [500, 1, 5, 5]))))
    assert "Not among held-out labels: tail (3)" in groups.caption


def test_classes_worst_first_and_the_rest_folded() -> None:
    v = 25
    labels = torch.arange(250)[:, None] % (v - 1)  # none of the last
    student = saying(torch.where(torch.arange(250)[:, None] // (v - 1) < labels % 10, (labels + 1) % v, labels), v)
    given = evidence({"teacher": saying(labels, v), "student distilled": student}, labels)
    found = Quality().figures(given)
    f1 = per_class(given.observed.models["student distilled"].top, given.observed.labels, v).f1
    assert found["by_class"]["classes"][3]["models"]["student distilled"]["f1"] == pytest.approx(f1[3])  # of ten rows: no interval
    blocks = shown(found)
    table = of(Grid, blocks)[-1]
    order = [int(row[0].split()[1]) for row in table.rows]
    assert len(order) == 20
    np.testing.assert_allclose(f1[order], np.sort(f1[:24])[:20])
    assert all(row[-1] == "100.0 %" for row in table.rows)  # the teacher's
    (fold,) = of(Fold, blocks)
    assert fold.summary == "The other 4 classes"
    assert len(fold.text.splitlines()) == 5
    assert any("class 24" in block.why for block in of(Missing, blocks))


def test_classes_of_enough_rows_have_intervals() -> None:
    labels = torch.arange(200)[:, None] % 2
    student = saying(torch.where(torch.arange(200)[:, None] % 5 == 0, 1 - labels, labels), 2)
    found = Quality().figures(evidence({"teacher": saying(labels, 2), "student distilled": student}, labels))
    for each in found["by_class"]["classes"]:
        for key in ("precision", "recall", "f1"):
            figure = each["models"]["student distilled"][key]
            assert figure["value"] == pytest.approx(0.8)
            half = 1.96 * (0.8 * 0.2 / 100) ** 0.5  # of a binomial share of 100
            assert figure["high"] - figure["low"] == pytest.approx(2 * half, rel=0.3)


def test_a_group_of_few_rows_has_no_interval() -> None:
    labels = torch.tensor([0] * 35 + [1] * 5)[:, None]
    logits = {name: random(seed, 40)[0] for seed, name in enumerate(("teacher", "student distilled"))}
    given = evidence(logits, labels, [500, 5, 5, 5])
    groups = Quality().figures(given)["groups"]
    columns = given.observed.models["teacher"]
    assert set(groups["head"]["models"]["teacher"]["accuracy"]) == {"value", "low", "high"}
    assert groups["tail"]["models"]["teacher"]["accuracy"] == pytest.approx((columns.top[35:] == 1).mean())
    assert groups["tail"]["models"]["teacher"]["loss"] == pytest.approx(columns.nll[35:].mean())


def test_rows_that_were_not_looked_at_are_told() -> None:
    given = classifier()
    texts = [note.text for note in of(Note, shown(Quality().figures(replace(given, observed=replace(given.observed, of_rows=1000)))))]
    assert any("40 of 1,000 held-out rows" in text for text in texts)
    assert not any("held-out rows" in note.text for note in of(Note, shown(Quality().figures(given))))


def test_the_picture_leaves_the_untrained_student_out_where_there_is_one_alone(tmp_path: Path) -> None:
    (picture,) = of(Picture, shown(Quality().figures(classifier())))
    for number, figure in enumerate(picture.figure):
        names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert names == ["teacher", "student alone", "student distilled"]
        figure.savefig(tmp_path / f"{number}.png")
    assert "in the table" in picture.caption
