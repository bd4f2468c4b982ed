"""Logs written by hand, and by the logger itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from distill.callbacks.metrics import JsonlLogger
from distill.report.history.series import Series, as_lists, at, from_lists, read, restarts, series, step_seconds, thin
from tests.report.made import line


def test_a_resume_takes_the_place_of_what_it_repeats() -> None:
    lines = [line(9, 1, train__loss=5.0), line(19, 2, train__loss=4.0), line(29, 3, train__loss=3.0), line(29, 3, val__loss=3.5)]
    lines += [line(19, 4, train__loss=4.25), line(24, 5, val__loss=3.0)]  # goes on from step 10; 29 was thrown away
    found = series(lines)
    assert (found["train/loss"].steps.tolist(), found["train/loss"].values.tolist()) == ([9, 19], [5.0, 4.25])
    assert (found["val/loss"].steps.tolist(), found["val/loss"].values.tolist()) == ([24], [3.0])
    assert restarts(lines) == 1
    assert restarts([line(9, 1, train__loss=5.0), line(9, 2, train__loss=5.0)]) == 1


def test_what_is_logged_past_the_others_with_a_step_of_its_own_is_no_restart() -> None:
    lines = [line(200, 1, train__kd_grad_norm_exact=1.0), line(199, 1, train__loss=2.0), line(209, 1, train__loss=2.0)]
    assert restarts(lines) == 0
    assert len(series(lines)["train/kd_grad_norm_exact"].steps) == 1


def test_the_loggers_words_for_what_is_not_finite_are_read(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    for step, value in enumerate((1.0, math.nan, math.inf, 4.0)):
        logger.log_metrics({"train/loss": value}, step)
    found = series(read(tmp_path / "metrics.jsonl"))["train/loss"]
    assert math.isnan(found.values[1])
    assert found.values[2] == math.inf
    assert found.finite.steps.tolist() == [0, 3]
    assert json.dumps(as_lists(found), allow_nan=False) == "[[0.0, 3.0], [1.0, 4.0]]"


def test_a_torn_line_ends_the_log_and_none_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1, "a": 2}\n{"step": 1, "ti')
    assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "time": 1, "a": 2}]


def test_thinning_keeps_the_means() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    thinned = thin(Series(np.arange(100_000.0), values))
    assert len(thinned.steps) == 400
    np.testing.assert_allclose(thinned.values, values.reshape(400, 250).mean(1))
    np.testing.assert_allclose(thinned.steps, np.arange(100_000).reshape(400, 250).mean(1))
    odd = thin(Series(np.arange(7.0), np.arange(7.0)), points=3)
    np.testing.assert_allclose(odd.values, [np.mean(part) for part in ([0, 1], [2, 3], [4, 5, 6])])
    assert thin(Series(np.arange(3.0), np.arange(3.0)), 3).values.tolist() == [0, 1, 2]


def test_there_and_back() -> None:
    curve = from_lists(json.loads(json.dumps(as_lists(Series(np.array([1.0, 2.0]), np.array([1 / 3, 123456.7]))))))
    assert curve.values.tolist() == [0.333333, 123457.0]
    assert at(curve, 1.5) == pytest.approx((0.333333 + 123457) / 2)


def test_seconds_of_a_step_leave_validation_out() -> None:
    lines = [line(step, time, train__loss=1.0) for step, time in ((9, 10.0), (19, 12.0), (29, 70.0), (39, 74.0), (49, 76.0))]
    lines.insert(2, line(19, 50.0, val__loss=1.0))
    assert step_seconds(lines) == pytest.approx(0.2)  # the median of 0.2, 0.4, 0.2
    assert step_seconds(lines[:1]) is None
