"""The bench of structured pruning runs, and compares a model with a smaller one that computes what the masked one did."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


def test_it_measures_both_and_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import structured as bench  # type: ignore[import-not-found]

    bench.main(["--layers", "1", "--width", "64", "--batches", "1", "--lengths", "8", "--calls", "3", "--warm-up", "1"])
    printed = capsys.readouterr().out
    sys.modules.pop("structured")
    assert "logits differ from the masked model's by at most" in printed
    gap = float(printed.split("at most ")[1].split()[0])
    assert gap <= 1e-5
    cells = [cell.strip(" *") for cell in printed.splitlines()[-1].split("|")[1:-1]]
    assert cells[:2] == ["1", "8"]
    assert float(cells[-1]) == pytest.approx((4 * 64 + 2 * 8 + 2 * 256) / (4 * 64 + 2 * 8 + 2 * 128), abs=0.01)
    assert all(float(cell) > 0 for cell in cells[2:5])


def test_half_the_neurons_are_half_the_parameters_of_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import structured as bench

    whole = bench.encoder(1, 64)
    part: Any = bench.pruned(0.5, 1, 64)[0]
    sys.modules.pop("structured")
    sizes = [sum(p.numel() for p in model.bert.encoder.parameters()) for model in (whole, part)]
    assert sizes[0] - sizes[1] == 128 * (64 + 64 + 1)
