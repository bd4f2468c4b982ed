import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from distill.metrics.temperature import scaled
from distill.report.evidence import Columns, Evidence, Observed
from distill.report.page.blocks import Grid, Missing, Note, Picture
from distill.report.sections.calibration import Calibration

V, ROWS, PER = 5, 150, 20
N, STUDENT = ROWS * PER, "student distilled"


def columns(logits: Any, labels: Any, sample: Any, keep: bool) -> Columns:
    logp = torch.from_numpy(logits).double().log_softmax(-1)
    probs, rights = logp.exp().numpy(), np.eye(logits.shape[1])[labels]
    looked = torch.from_numpy(logits[sample]).float()
    return Columns(
        nll=-logp.numpy()[np.arange(len(labels)), labels],
        top=probs.argmax(1),
        confidence=probs.max(1),
        entropy=-(probs * logp.numpy()).sum(1),
        brier=((probs - rights) ** 2).sum(1),
        against=None,
        logits=looked.numpy() if keep else None,
        scaled=scaled(looked, torch.from_numpy(labels[sample])).numpy(),
    )


LOGITS = 1.5 * np.random.default_rng(0).normal(size=(N, V))


def evidence(sharp: dict[str, float], keep: bool = True) -> Evidence:
    """Models whose logits are so many times those that the labels follow.

    Labels are spread evenly over each level of confidence, not drawn: of drawn ones a calibrated model is called too certain or cautious
    for one seed in twenty, as 95 % means.
    """
    chances = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    ranks = chances.max(1).argsort().argsort()
    even = (ranks * (np.sqrt(5) - 1) / 2) % 1  # golden ratio: neighbours in rank lie far apart
    labels = (even[:, None] > chances.cumsum(1)).sum(1).clip(max=V - 1)
    sample = np.arange(0, N, 3)
    models = {name: columns(factor * LOGITS, labels, sample, keep) for name, factor in sharp.items()}
    observed = Observed(labels, np.repeat(np.arange(ROWS), PER), sample, models, 2, V, ROWS)
    nothing: Any = None
    task: Any = SimpleNamespace(unit="token")
    subjects: Any = dict.fromkeys(sharp)
    return Evidence(Path(), STUDENT, subjects, task, nothing, torch.device("cpu"), [], observed, {}, [], {})


def report(given: Evidence) -> tuple[dict[str, Any], list[Any]]:
    """Figures as they come back from `report.json`, and the blocks made of them."""
    figures = json.loads(json.dumps(Calibration().figures(given), allow_nan=False))
    return figures, Calibration().blocks(figures)


def verdict(blocks: list[Any]) -> Note:
    assert isinstance(blocks[0], Note)
    return blocks[0]


@pytest.fixture(scope="module")
def both() -> tuple[Evidence, dict[str, Any], list[Any]]:
    given = evidence({"teacher": 1.0, STUDENT: 2.0})
    return given, *report(given)


def test_figures_are_those_of_the_libraries(both: Any) -> None:
    given, figures, _ = both
    for name, factor in (("teacher", 1.0), (STUDENT, 2.0)):
        found, said = figures["models"][name], given.observed.models[name]
        labels = given.observed.labels
        probs = torch.from_numpy(factor * LOGITS).softmax(-1)
        assert found["nll"]["value"] == pytest.approx(log_loss(labels, probs.numpy()))
        assert found["brier"]["value"] == pytest.approx(brier_score_loss(labels, probs.numpy(), scale_by_half=False))
        expected = multiclass_calibration_error(probs, torch.from_numpy(labels), num_classes=V, n_bins=15)
        assert found["ece"]["value"] == pytest.approx(expected.item(), rel=1e-5)
        order = np.argsort(probs.amax(-1).numpy())  # 15 bins of 200 positions
        gaps = (probs.amax(-1).numpy() - (probs.argmax(-1).numpy() == labels))[order].reshape(15, 200)
        assert found["adaptive_ece"]["value"] == pytest.approx(np.abs(gaps.mean(1)).mean())
        assert found["accuracy"]["value"] == pytest.approx((probs.argmax(-1).numpy() == labels).mean())
        gap = given.observed.resampler.difference(said.confidence, said.correct(labels).astype(float))
        assert found["overconfidence"] == pytest.approx(gap.as_dict())
        assert sum(each["count"] for each in found["reliability"]) == N


def test_intervals_are_of_rows_and_hold_their_values(both: Any) -> None:
    given, figures, _ = both
    expected = given.observed.resampler.mean(given.observed.models[STUDENT].nll)
    assert figures["models"][STUDENT]["nll"] == pytest.approx(expected.as_dict())
    for model in figures["models"].values():
        for key in ("accuracy", "confidence", "overconfidence", "ece", "adaptive_ece", "classwise_ece", "nll", "brier"):
            assert model[key]["low"] <= model[key]["value"] <= model[key]["high"], key


def test_only_the_sharp_student_is_out_of_calibration(both: Any) -> None:
    _, figures, _ = both
    teacher, student = figures["models"]["teacher"], figures["models"][STUDENT]
    for key in ("ece", "adaptive_ece", "classwise_ece"):
        assert teacher[key]["low"] == 0, key
        assert student[key]["low"] > 0.03, key
    assert figures["beside_teacher"]["overconfidence"]["low"] > 0.05


def test_one_temperature_mends_the_sharp_student(both: Any) -> None:
    _, figures, blocks = both
    fit = figures["models"][STUDENT]["temperature"]
    assert fit["fitted"]["low"] <= 2 <= fit["fitted"]["high"]
    assert fit["ece_after"]["low"] == 0 < fit["ece_before"]["low"]
    assert fit["nll_after"]["value"] < fit["nll_before"]["value"]
    said = next(block.text for block in blocks if isinstance(block, Note) and "One number" in block.text)
    assert f"divided by {fit['fitted']['value']:.2f}" in said


def test_a_student_more_certain_than_it_has_a_right_to_be_is_called_so(both: Any) -> None:
    _, figures, blocks = both
    note, student = verdict(blocks), figures["models"][STUDENT]
    over, more = student["overconfidence"]["value"], figures["beside_teacher"]["overconfidence"]["value"]
    assert note.tone == "warning"
    assert note.text.startswith("The student is more certain than it has a right to be.")
    assert f"a probability of {100 * student['confidence']['value']:.1f} %" in note.text
    assert f"right in {100 * student['accuracy']['value']:.1f} % of cases: {100 * over:.1f} points (" in note.text
    assert f"That is {100 * more:.1f} points (" in note.text


def test_a_student_no_more_so_than_its_teacher_is_no_warning() -> None:
    note = verdict(report(evidence({"teacher": 2.0, STUDENT: 1.9}))[1])
    assert note.tone == "plain"
    assert note.text.startswith("The student is more certain than it has a right to be.")
    assert note.text.endswith("Its teacher is no less so.")


def test_more_than_the_teacher_is_said_only_where_it_is_no_chance(both: Any) -> None:
    _, figures, _ = both
    maybe = {"value": 0.002, "low": -0.01, "high": 0.014}
    note = verdict(Calibration().blocks(figures | {"beside_teacher": figures["beside_teacher"] | {"overconfidence": maybe}}))
    assert (note.tone, note.text.endswith("Its teacher is no less so.")) == ("plain", True)


def test_a_cautious_student_is_called_so() -> None:
    figures, blocks = report(evidence({"teacher": 0.8, STUDENT: 0.5}))
    under = -100 * figures["models"][STUDENT]["overconfidence"]["value"]
    assert verdict(blocks).text.startswith("The student is less certain than it could be.")
    assert f"{under:.1f} points (" in verdict(blocks).text
    assert "too cautious. Its teacher is so by " in verdict(blocks).text
    assert "Its teacher" not in verdict(report(evidence({"teacher": 1.0, STUDENT: 0.5}))[1]).text


def test_a_calibrated_student_is_good() -> None:
    note = verdict(report(evidence({"teacher": 1.5, STUDENT: 1.0}))[1])
    assert note.tone == "good"
    assert note.text.startswith("The student is as certain as it has a right to be.")


def test_errors_that_cancel_on_average_are_told() -> None:
    given = evidence({"teacher": 1.0, STUDENT: 1.0})
    observed = given.observed
    old = observed.models[STUDENT]
    right = old.correct(observed.labels)
    level = np.random.default_rng(1).permutation(np.sort(old.confidence))  # says nothing of the positions, but is right on average
    level += right.mean() - level.mean()
    models = {"teacher": observed.models["teacher"], STUDENT: replace(old, confidence=level)}
    note = verdict(report(replace(given, observed=replace(observed, models=models)))[1])
    assert note.tone == "plain"
    assert "on average alone" in note.text
    assert "too certain at some levels and too cautious at others" in note.text


def test_the_picture_has_teacher_and_student_and_the_tables_have_every_model() -> None:
    _, blocks = report(evidence({"teacher": 1.0, "student before": 0.1, STUDENT: 2.0}))
    picture = next(block for block in blocks if isinstance(block, Picture))
    assert [axes.get_title("left") for axes in picture.figure.axes] == ["teacher", STUDENT]  # type: ignore[union-attr]
    for grid in (block for block in blocks if isinstance(block, Grid)):
        assert [row[0] for row in grid.rows] == ["teacher", "student before", STUDENT]
        assert all(len(row) == len(grid.head) for row in grid.rows)
        assert all(cell for row in grid.rows for cell in row)


def test_points_of_the_picture_are_the_bins(both: Any) -> None:
    _, figures, blocks = both
    axes = next(block for block in blocks if isinstance(block, Picture)).figure.axes[1]
    line = axes.lines[-1]
    drawn = [each for each in figures["models"][STUDENT]["reliability"] if each["count"] >= 10]
    np.testing.assert_allclose(line.get_xdata(), [each["confidence"] for each in drawn])
    np.testing.assert_allclose(line.get_ydata(), [each["accuracy"]["value"] for each in drawn])
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
    for bar, each in zip(axes.patches, figures["models"][STUDENT]["reliability"], strict=True):
        assert bar.get_x() - 0.01 <= each["confidence"] <= bar.get_x() + bar.get_width() + 0.01


def test_bins_of_few_positions_are_no_points(both: Any) -> None:
    _, figures, _ = both
    figures = json.loads(json.dumps(figures))
    bins = figures["models"][STUDENT]["reliability"]
    bins[-1]["count"], bins[-2]["count"] = 9, 10
    axes = next(block for block in Calibration().blocks(figures) if isinstance(block, Picture)).figure.axes[1]
    drawn = list(axes.lines[-1].get_xdata())
    assert bins[-1]["confidence"] not in drawn
    assert bins[-2]["confidence"] in drawn


def test_widths_are_compared(both: Any) -> None:
    _, figures, blocks = both
    nll = [figures["models"][name]["nll"] for name in (STUDENT, "teacher")]
    ratio = (nll[0]["high"] - nll[0]["low"]) / (nll[1]["high"] - nll[1]["low"])
    assert figures["beside_teacher"]["widths"]["nll"] == pytest.approx(ratio)
    said = blocks[-1].text
    assert f"{ratio:.2f} times as wide for NLL" in said
    assert "1.00 times as wide for accuracy" in said  # they answer alike


def test_without_a_teacher_the_student_is_shown_alone() -> None:
    figures, blocks = report(evidence({STUDENT: 2.0}))
    assert "no teacher" in figures["beside_teacher"]["missing"]
    assert verdict(blocks).tone == "warning"
    assert len(next(block for block in blocks if isinstance(block, Picture)).figure.axes) == 1  # type: ignore[union-attr]
    assert any(isinstance(block, Missing) and "no teacher" in block.why for block in blocks)


def test_classwise_ece_says_why_it_is_missing() -> None:
    _, blocks = report(evidence({"teacher": 1.0, STUDENT: 2.0}, keep=False))
    missing = next(block for block in blocks if isinstance(block, Missing))
    assert missing == Missing("class-wise ECE", "it needs each class often, 50 positions for 5 classes; 1,000 were sampled")
    assert "class-wise ECE" not in next(block for block in blocks if isinstance(block, Grid)).head


def test_a_temperature_beyond_the_grid_is_said_to_be() -> None:
    _, blocks = report(evidence({"teacher": 1.0, STUDENT: 9.0}))
    grid = [block for block in blocks if isinstance(block, Grid)][1]
    assert dict(zip(grid.head, grid.rows[1], strict=True))["fitted temperature"] == "≥ 4"


def test_infinite_losses_and_single_rows_leave_a_gap_with_a_reason() -> None:
    given = evidence({"teacher": 1.0, STUDENT: 1.0})
    given.observed.models[STUDENT].nll[7] = np.inf
    figures, blocks = report(given)
    assert "1 of 3,000 positions have an infinite value" in figures["models"][STUDENT]["nll"]["missing"]
    assert "infinite" in figures["beside_teacher"]["widths"]["nll"]["missing"]
    assert verdict(blocks).tone == "good"
    given.observed.rows[:] = 0
    given.observed.__dict__.pop("resampler")
    figures, blocks = report(given)
    assert "only one held-out row" in figures["models"][STUDENT]["ece"]["missing"]
    assert "only one held-out row" in verdict(blocks).text


def test_few_rows_do_not_call_a_student_calibrated() -> None:
    """It says 53 % and is right in half of six cases: nothing is known, rather than that all is well."""
    given = evidence({STUDENT: 1.0})
    rng, size = np.random.default_rng(1), 6
    z = rng.normal(size=(size, V))
    top = z.argmax(1)
    labels = np.where(np.arange(size) % 2 == 0, top, (top + 1) % V)
    sample = np.arange(size)
    observed = Observed(labels, np.arange(size), sample, {STUDENT: columns(z, labels, sample, True)}, 2, V, size)
    figures, blocks = report(replace(given, observed=observed))
    over = figures["models"][STUDENT]["overconfidence"]
    assert over["low"] < -0.05 < 0.05 < over["high"]
    assert verdict(blocks).tone == "plain"
    assert "too few to rule it out" in verdict(blocks).text
    error = figures["models"][STUDENT]["ece"]
    assert error["low"] <= error["value"] <= error["high"]
