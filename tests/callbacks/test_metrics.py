import csv
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from distill.callbacks import metrics
from distill.callbacks.metrics import JsonlLogger, Throughput
from tests.callbacks.tiny import Clock, Tiny, loader, trainer


def read(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_writes_what_lightnings_csv_logger_writes(tmp_path: Path) -> None:
    ours, theirs = JsonlLogger(tmp_path / "run"), CSVLogger(tmp_path / "csv")
    trainer(logger=[ours, theirs], max_epochs=2).fit(Tiny(), loader(), loader())
    lines = read(tmp_path / "run")
    rows = list(csv.DictReader((Path(theirs.log_dir) / "metrics.csv").open()))
    assert len(lines) == len(rows) == 2 * (4 + 1)
    for line, row in zip(lines, rows, strict=True):
        assert {k: v for k, v in line.items() if k != "time"} == {k: float(v) for k, v in row.items() if v}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_trainer_puts_everything_into_the_folder(tmp_path: Path) -> None:
    t = trainer(logger=JsonlLogger(tmp_path / "run"), max_steps=1, enable_checkpointing=True)
    t.fit(Tiny(), loader())
    assert t.log_dir == str(tmp_path / "run")
    assert [p.parent for p in tmp_path.rglob("*.ckpt")] == [tmp_path / "run" / "checkpoints"]


def test_resumed_run_drops_a_torn_line_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    first = JsonlLogger(tmp_path)
    clock.sleep(5)
    first.log_metrics({"loss": 2.0}, 0)
    clock.sleep(1)
    first.log_metrics({"loss": 1.5}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    clock.sleep(1000)
    second = JsonlLogger(tmp_path)
    clock.sleep(2)
    second.log_metrics({"loss": 1.0}, 2)
    assert read(tmp_path) == [
        {"step": 0, "time": 5.0, "loss": 2.0},
        {"step": 1, "time": 6.0, "loss": 1.5},
        {"step": 2, "time": 8.0, "loss": 1.0},
    ]


def test_a_file_with_nothing_but_a_torn_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 3')
    JsonlLogger(tmp_path).log_metrics({"loss": 1.0}, 0)
    assert [line["loss"] for line in read(tmp_path)] == [1.0]


def test_values_that_are_not_finite_are_strings_that_float_reads(tmp_path: Path) -> None:
    JsonlLogger(tmp_path).log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1}, 0)
    (line,) = read(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d"]) == ("nan", "inf", "-inf", 1)
    assert math.isnan(float(line["a"]))
    assert (float(line["b"]), float(line["c"])) == (math.inf, -math.inf)


def test_a_kill_loses_no_line_that_was_logged(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        logger = JsonlLogger(tmp_path)
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 2]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    JsonlLogger(tmp_path / "run").log_metrics({"loss": 1.0}, 0)
    assert not (tmp_path / "run").exists()


def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *keys: str) -> dict[int, float]:
    """Train four optimizer steps of two micro-batches, half a second each, validate for 400 s after every two, log every two."""
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    model = Tiny(on_train=lambda: clock.sleep(0.5), on_val=lambda: clock.sleep(100))
    t = trainer(Throughput(), logger=JsonlLogger(tmp_path), max_epochs=2, accumulate_grad_batches=2, log_every_n_steps=2)
    t.fit(model, loader(*keys), loader(*keys))
    assert ("tokens_per_s" in t.progress_bar_metrics) == ("input_ids" in keys)
    return {line["step"]: line["tokens_per_s"] for line in read(tmp_path) if "tokens_per_s" in line and "loss" in line}


def test_throughput_counts_the_mask_and_leaves_validation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(tmp_path, monkeypatch, "input_ids", "attention_mask") == {1: 20 / 2, 3: 20 / 2}


def test_throughput_without_mask_counts_every_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(tmp_path, monkeypatch, "input_ids") == {1: 32 / 2, 3: 32 / 2}


def test_throughput_counts_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 3))
    assert rates(tmp_path, monkeypatch, "input_ids") == {1: 3 * 32 / 2, 3: 3 * 32 / 2}


def test_throughput_of_images_is_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(tmp_path, monkeypatch, "pixel_values") == {}


def test_throughput_reads_the_device_only_when_it_logs() -> None:
    batch = {"input_ids": torch.ones(2, 4, device="meta"), "attention_mask": torch.ones(2, 4, device="meta")}  # reading meta raises
    state: Any = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=1)
    throughput = Throughput()
    throughput.on_train_start(state, Tiny())
    for state.global_step in (0, 1, 1):
        throughput.on_train_batch_end(state, Tiny(), None, batch, 0)
    state.global_step = 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        throughput.on_train_batch_end(state, Tiny(), None, batch, 0)
