"""The benches run, and what they compare is the same work."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("overhead")
    sys.modules.pop("overhead")


def test_the_bare_loop_does_what_the_trainer_does(overhead: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(v=64, length=16, batch=2, block=2, blocks=3, warm_up=2, profile=False)
    turns = overhead.measure(args, tmp_path)
    assert len(turns.ours) == len(turns.bare) == 3
    assert max(turns.gaps) < 1e-5, "after every block both have trained to the same loss"
    assert all(spent.clock > 0 and spent.process > 0 for spent in [*turns.ours, *turns.bare])


def test_a_bare_loop_that_trains_otherwise_would_be_noticed(overhead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "WEIGHTS", {"ce": 0.3, "kd": 0.7})
    real = overhead.Bare.step

    def no_schedule(self: Any, batch: Any) -> None:
        real(self, batch)
        self.optimizer.param_groups[0]["lr"] = 0.0

    monkeypatch.setattr(overhead.Bare, "step", no_schedule)
    args = argparse.Namespace(v=64, length=16, batch=2, block=2, blocks=3, warm_up=2, profile=False)
    assert max(overhead.measure(args, tmp_path).gaps) > 1e-5
