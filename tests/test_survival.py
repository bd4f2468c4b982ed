"""SIGKILL at random moments, again and again: every run ends as if it had never been killed, to the bit."""

import json
import logging
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from distill import checkpoints
from distill.balance.gradnorm import GradNorm
from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO
from distill.callbacks.metrics import JsonlLogger
from distill.callbacks.pruning import Pruning
from distill.callbacks.qat import QuantizationAwareTraining
from distill.optim import AdamW
from distill.students.load import FromConfig
from tests import pair
from tests.ranks import _server

STEPS, PATIENCE_S = 40, 120
SAVED = {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "balancer", "rng", "PromptData"}


class Noise(pl.Callback):
    """Draws from every generator before each micro-batch, as an augmentation would, and has a state of its own."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.total = pipe, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pipe.send("started")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.total += random.gauss(0, 1) + np.random.randn() + torch.randn(()).item()
        pl_module.log("noise", self.total)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = state_dict["total"]


def train(pipe: Connection, base: Path, run: Path, asynchronous: bool, compressed: bool) -> None:
    """Go on from the newest checkpoint, or start: dropout, accumulation, a balancer with a state, a schedule, several epochs.

    Compressed, half of the weights are pruned, by scores that are learned, while the others are quantised more and more.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    module = pair.module(
        base,
        student=FromConfig(pair.STUDENT | {"attention_dropout": 0.2}),
        balancer=GradNorm(),
        optimizer=AdamW(lr=1e-2, warmup=5, schedule="cosine"),
    )
    compressions: list[pl.Callback] = []
    if compressed:
        pruning = Pruning(0.5, method="movement", begin=0.1, end=0.8, every=2)
        compressions = [pruning, QuantizationAwareTraining("int4", group_size=8, start=0.2, warmup=0.6)]
    trainer = pair.trainer(
        max_steps=STEPS,
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=[Noise(pipe), *compressions, Checkpoints(run / "checkpoints", every=2)],
        plugins=[AsyncCheckpointIO() if asynchronous else AtomicCheckpointIO()],
        logger=[JsonlLogger(run)],
    )
    trainer.fit(module, pair.data(base, batch_size=4), ckpt_path=checkpoints.newest_good(run / "checkpoints"))
    pipe.send("done")
    pipe.recv()


def killed(
    base: Path, run: Path, asynchronous: bool, after_s: float | None, saving: bool = False, compressed: bool = False
) -> tuple[bool, float]:
    """Train and kill; say whether it came to the end before, and the seconds it trained.

    Args:
        base: holds the teacher and the data.
        run: the run's folder.
        asynchronous: whether it saves while it trains.
        after_s: seconds of training until the kill; None for no kill.
        saving: whether to wait for the next save then.
        compressed: whether the student is pruned and quantised along.
    """
    context = _server()
    ours, theirs = context.Pipe()
    process = context.Process(target=train, args=(theirs, base, run, asynchronous, compressed), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE_S), "training did not start"
        if (first := ours.recv()) == "done":  # the kill before came after the last checkpoint: there is nothing left to train
            return True, 0.0
        assert first == "started"
        start = time.monotonic()
        done = ours.poll(PATIENCE_S if after_s is None else after_s)
        while saving and not done and not any((run / "checkpoints").glob(".*.tmp")):
            done = ours.poll(0.0005)
        if done:
            assert ours.recv() == "done"  # a child that raised has closed the pipe: EOFError
        return done, time.monotonic() - start
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def values(run: Path) -> dict[tuple[int, str], Any]:
    """Every logged value by step and name; of a step that was logged again the later one, as `JsonlLogger` says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name not in ("step", "time")}


def in_a_save(run: Path) -> bool:
    """Whether a save was going on when the run was killed."""
    folder = run / "checkpoints"
    whole = checkpoints.published(folder)
    return any(folder.glob(".*")) or whole != checkpoints.candidates(folder) or (whole[:1] or [None]) != [checkpoints.latest(folder)]


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.parametrize(("total", "compressed"), [(50, False), (8, True)], ids=["50 kills", "pruned and quantised"])
def test_kills_leave_no_trace(tmp_path: Path, total: int, compressed: bool) -> None:
    pair.data(tmp_path)  # makes the teacher and the prompts
    done, seconds = killed(tmp_path, tmp_path / "whole", False, None, compressed=compressed)
    assert done
    whole = values(tmp_path / "whole")
    last = checkpoints.name_of(STEPS)
    end = torch.load(tmp_path / "whole" / "checkpoints" / last)
    assert end.keys() >= SAVED
    assert any(name.endswith("mask") for name in end["state_dict"]) == compressed
    rng = random.Random(5)
    kills = torn = missing = chains = 0
    while kills < total:
        chains += 1
        run, done = tmp_path / f"chain{chains}", False
        while not done:
            after_s = rng.uniform(0, seconds / 10) if kills < total else None
            # half of them save while they train; every third is killed in a save, wherever that is
            saving = after_s is not None and kills % 3 == 0
            done, _ = killed(tmp_path, run, kills % 2 == 1, after_s, saving, compressed)
            kills += not done
            torn += not done and in_a_save(run)
        logged = values(run)
        assert {key: value for key, value in logged.items() if value != whole[key]} == {}
        # the line of a step is written just after its checkpoint: a kill between the two loses it
        missing += len({step for step, _ in whole.keys() - logged.keys()})
        found = torch.load(run / "checkpoints" / last)
        assert_same({k: end[k] for k in SAVED}, {k: found[k] for k in SAVED})
    print(f"{kills} kills, {torn} of them in a save, {chains} runs, {missing} log lines lost, {seconds:.1f} s a run")
    assert torn >= total // 16
    assert missing <= kills
