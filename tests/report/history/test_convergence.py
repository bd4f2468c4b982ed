"""Curves of known shape."""

import numpy as np
import pytest

from distill.report.history.convergence import ending, pull, voices
from distill.report.history.series import Series


def curve(values: list[float], every: int = 10) -> Series:
    return Series(np.arange(len(values)) * every + every - 1.0, np.array(values))


def test_validation_that_settles_falls_or_rises() -> None:
    settled = ending({"val/loss": curve([5, 3, 2, 2, 2])})
    assert settled["state"] == "settled"
    assert settled["fell"] == pytest.approx(0.0)
    falling = ending({"val/loss": curve([5.0, 4.0, 3.0, 2.0, 1.0])})
    assert falling["state"] == "falling"
    assert falling["fell"] == pytest.approx(0.5)  # 50 steps: the last five, of a nat in ten
    assert falling["whole"] == pytest.approx(4.0)
    assert "0.5000 nats" in falling["says"]
    assert "12 %" in falling["says"]
    rising = ending({"val/loss": curve([5, 2, 1, 2, 3])})
    assert rising["state"] == "rising"
    assert "1.0000 nats after step 30" in rising["says"]
    assert "is 3.0000" in rising["says"]


def test_without_validation_the_training_loss_tells() -> None:
    falls = np.linspace(10, 0, 100).tolist()
    found = ending({"train/loss": curve(falls), "val/loss": curve([1.0, 1.0])})
    assert (found["of"], found["state"]) == ("train/loss", "falling")
    assert found["fell"] == pytest.approx(100 / 99)  # ten points of a hundred
    assert ending({"train/loss": curve([10.0] * 50 + [1.0] * 50)})["state"] == "settled"
    assert "Too little" in ending({"train/loss": curve([1.0] * 19)})["says"]
    assert "Too little" in ending({})["says"]


def terms(**norms: float) -> dict[str, Series]:
    found = {f"train/{name}_grad_norm": curve([norm] * 4) for name, norm in norms.items()}
    return found | {f"train/{name}_weight": curve([0.5] * 4) for name in norms}


def test_shares_of_the_pull() -> None:
    found = terms(a=3.0, b=1.0)
    found["train/b_weight"] = curve([9.0, 9.0, 1.5, 1.5])  # the second half counts
    assert pull(found, ["a", "b"]) == {"at": "branch points", "shares": {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}}
    found |= {"train/a_grad_norm_exact": curve([1.0, 1.0], 20), "train/b_grad_norm_exact": curve([1.0, 1.0], 20)}
    exact = pull(found, ["a", "b"])
    assert exact["at"] == "parameters"
    assert exact["shares"]["a"] == pytest.approx(0.25)
    assert "missing" in pull({}, ["a", "b"])
    assert "missing" in pull(found, ["a"])


def test_who_is_silent_and_who_dominates() -> None:
    (silent, dominant) = voices(pull(terms(a=0.001, b=1.0), ["a", "b"]))
    assert "`a` was all but silent: 0.1 %" in silent
    assert "`b` dominated: 100 %" in dominant
    assert voices(pull(terms(a=1.0, b=5.0), ["a", "b"])) == []
    assert voices({"missing": "why"}) == []
