import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import rich
import torch
from torch.utils.data import DataLoader, IterableDataset

from distill.callbacks import progress
from distill.callbacks.progress import ProgressLines, StepBar, progress_callback
from distill.types import ConfigError
from tests.callbacks.tiny import Clock, Tiny, loader, trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]


def test_line_reads_as_documented(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    class Logs(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            clock.sleep(41)
            self.log_dict({"loss": 4.812, "ce": 5.01, "kd": 2.33, "tokens_per_s": 21_300.0}, prog_bar=True)
            self.log("hidden", 1.0)
            return self.layer(batch["input_ids"].float()).sum()

    trainer(ProgressLines(), max_steps=2).fit(Logs(), loader())
    assert lines(capsys)[0] == "step 1/2 · loss 4.812 · ce 5.01 · kd 2.33 · 21.3k tokens/s · 0:41 left"


def test_lines_come_every_n_seconds_and_at_both_ends(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    model = Tiny(on_train=lambda: clock.sleep(2.5))  # two micro-batches to a step: 5 s
    t = trainer(ProgressLines(every_s=10), max_steps=6, max_epochs=-1, accumulate_grad_batches=2)
    t.fit(model, loader())
    out = lines(capsys)
    assert [line.split(" · ")[0] + line.split(" · ")[-1] for line in out] == [
        "step 1/60:25 left",
        "step 3/60:15 left",
        "step 5/60:05 left",
        "step 6/60:00 left",
    ]
    loss = re.search(r"loss ([0-9.e+-]+)", out[-1])
    assert loss
    assert float(loss[1]) == pytest.approx(t.callback_metrics["loss"].item(), rel=1e-3)


def test_time_left_after_a_resume_is_of_this_process(clock: Clock, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = Tiny(on_train=lambda: clock.sleep(5))
    first = trainer(max_steps=3)
    first.fit(model, loader())
    first.save_checkpoint(tmp_path / "3.ckpt")
    trainer(ProgressLines(), max_steps=6).fit(model, loader(), ckpt_path=tmp_path / "3.ckpt")
    assert re.fullmatch(r"step 4/6 · .* · 0:10 left", lines(capsys)[0])


def test_hours(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLines(), max_steps=2).fit(Tiny(on_train=lambda: clock.sleep(3600 + 2 * 60 + 3)), loader())
    assert lines(capsys)[0].endswith("1:02:03 left")


def test_training_that_ends_early_still_prints_its_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    trainer(ProgressLines(every_s=1e6), Stop(), max_steps=100, max_epochs=-1).fit(Tiny(), loader())
    assert [line.split(" · ")[0] for line in lines(capsys)] == ["step 1/100", "step 3/100"]


def test_a_stream_has_no_total_and_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            yield from [{"input_ids": torch.ones(4)}] * 2

    trainer(ProgressLines(), max_epochs=1).fit(Tiny(), DataLoader(Stream()))
    assert re.fullmatch(r"step 1 · loss [0-9.e+-]+", lines(capsys)[0])


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    trainer(ProgressLines(), max_steps=2).fit(Tiny(), loader())
    assert lines(capsys) == []


def test_seconds_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"every_s must be > 0, got 0"):
        ProgressLines(every_s=0)


def test_choice_follows_the_terminal_and_replaces_lightnings_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, StepBar), (False, ProgressLines)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        chosen = progress_callback()
        assert type(chosen) is kind
        assert [c for c in vars(trainer(chosen))["callbacks"] if isinstance(c, pl.callbacks.ProgressBar)] == [chosen]


@pytest.fixture
def screen() -> Iterator[io.StringIO]:
    before = rich.get_console().__dict__.copy()
    yield io.StringIO()
    rich.get_console().__dict__ = before


def test_bar_counts_optimizer_steps_over_epochs_and_resumes(screen: io.StringIO, tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float | None]] = []
            self.epochs: list[float] = []

        def on_train_epoch_start(self, *args: Any) -> None:
            self.epochs.append(bar.train_progress_bar.completed)

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            task = bar.train_progress_bar
            self.seen.append((task.completed, task.total))

    options: dict[str, Any] = {"max_epochs": -1, "accumulate_grad_batches": 2}
    console = {"file": screen, "force_terminal": True, "width": 160}
    bar, watch = StepBar(console_kwargs=console), Watch()
    t = trainer(bar, watch, max_steps=3, **options)
    t.fit(Tiny(), loader(), loader())
    t.save_checkpoint(tmp_path / "3.ckpt")
    assert watch.seen == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
    assert watch.epochs == [0, 2]  # no new start with the second epoch
    assert re.search(r"Training.*3/3.*loss: [0-9.]+", screen.getvalue())

    bar, watch = StepBar(console_kwargs=console), Watch()
    trainer(bar, watch, max_steps=5, **options).fit(Tiny(), loader(), ckpt_path=tmp_path / "3.ckpt")
    assert watch.seen[-1] == (5, 5)
    assert min(done for done, _ in watch.seen) == 3
