"""The share of a step that a part takes."""

import time
from pathlib import Path

import pytest
import torch

from distill import stopwatch
from distill.callbacks.metrics import Throughput
from distill.stopwatch import Stopwatch
from tests import pair

CPU = torch.device("cpu")


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopwatch, "time", made)
    return made


def test_two_laps_of_a_step(clock: Clock) -> None:
    watch = Stopwatch()
    watch.start(CPU)
    for seconds in (1.0, 2.0):
        clock.now += 3.5
        with watch.lap():
            clock.now += seconds
    clock.now += 2.0
    assert watch.stop() == pytest.approx(3 / 12)


def test_what_was_before_is_forgotten(clock: Clock) -> None:
    watch = Stopwatch()
    with watch.lap():
        clock.now += 50.0
    assert watch.stop() is None
    for share in (0.5, 0.25):
        watch.start(CPU)
        with watch.lap():
            clock.now += 4.0 * share
        clock.now += 4.0 * (1 - share)
        assert watch.stop() == pytest.approx(share)
    assert watch.stop() is None


def test_a_part_that_fails_is_not_counted_and_fails(clock: Clock) -> None:
    watch = Stopwatch()
    watch.start(CPU)
    with pytest.raises(OSError), watch.lap():
        raise OSError
    clock.now += 1.0
    assert watch.stop() == 0.0


def test_by_the_real_clock() -> None:
    watch = Stopwatch()
    watch.start(CPU)
    with watch.lap():
        time.sleep(0.02)
    share = watch.stop()
    assert share is not None
    assert 0.5 < share <= 1.0


def test_a_run_logs_the_teachers_share(tmp_path: Path) -> None:
    module = pair.module(tmp_path)
    trainer = pair.trainer(max_steps=2, log_every_n_steps=2, accumulate_grad_batches=2, callbacks=[Throughput()])
    trainer.fit(module, datamodule=pair.data(tmp_path))
    assert 0 < float(trainer.callback_metrics["teacher_share"]) < 1


def test_no_teacher_no_share(tmp_path: Path) -> None:
    module = pair.module(tmp_path)
    module.forget_teacher()
    trainer = pair.trainer(max_steps=1, log_every_n_steps=1, callbacks=[Throughput()])
    trainer.fit(module, datamodule=pair.data(tmp_path))
    assert "tokens_per_s" in trainer.callback_metrics
    assert "teacher_share" not in trainer.callback_metrics
