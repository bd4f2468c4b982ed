"""Whole runs while the server is away, side by side, with the time-outs that users get: no time is lost to speak of, and no metric."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import wandb

from distill.callbacks.metrics import JsonlLogger
from distill.callbacks.wandb import wandb_logger
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.ranks import _server
from tests.wandb_server import die, server_that

STEPS = 60
KINDS = ("answers", "refuses", "swallows", "is slow", "dies in the middle", "dies at the end")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Ran:
    """A run that has ended: how long it took, and what it left."""

    seconds: float
    folder: Path

    def jsonl(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def history(self) -> list[dict[str, Any]]:
        (folder,) = (self.folder / "wandb").glob("offline-run-*" if self.offline() else "run-*")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        records = map(json.loads, subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())
        return [record["history"]["item"] for record in records if record["type"] == "history"]

    def offline(self) -> bool:
        return any((self.folder / "wandb").glob("offline-run-*"))


class DieAtTheEnd(pl.Callback):
    def __init__(self, port: int) -> None:
        self.port = port

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        die(self.port)


def train(folder: Path, kind: str, port: int) -> None:
    """One run in a process of its own."""
    home = {name: str(folder / "home") for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC")}
    os.environ.update(home | {"WANDB_CONSOLE": "off", "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40})
    os.environ.pop("WANDB_MODE", None)
    os.chdir(folder)
    model, steps = Tiny(), iter(range(STEPS))
    model.on_train = lambda: die(port) if next(steps) == STEPS // 2 and kind == "dies in the middle" else None
    start = time.monotonic()
    loggers = [JsonlLogger(folder / "run"), wandb_logger("p", folder / "run", {})]
    trainer(*[DieAtTheEnd(port)] * (kind == "dies at the end"), logger=loggers, max_steps=STEPS, max_epochs=-1).fit(model, loader())
    wandb.teardown()  # which is what wandb does at the exit
    (folder / "seconds").write_text(str(time.monotonic() - start))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ran]]:
    runs = {}
    with ExitStack() as stack:
        for kind in KINDS:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            process = _server().Process(target=train, args=(folder, kind, stack.enter_context(server_that(kind))), daemon=True)
            process.start()
            stack.callback(process.kill)
            runs[kind] = folder, process
        for _, process in runs.values():
            process.join(240)
        yield {kind: Ran(float((folder / "seconds").read_text()), folder / "run") for kind, (folder, _) in runs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_metric_is_lost_and_little_time(kind: str, ran: dict[str, Ran]) -> None:
    lines, rows = ran[kind].jsonl(), ran[kind].history()
    assert [line["step"] for line in lines] == [row["trainer/global_step"] for row in rows] == list(range(STEPS))
    assert [line["loss"] for line in lines] == [row["loss"] for row in rows]
    assert ran[kind].offline() == (kind in ("refuses", "swallows"))
    print(f"{kind}: {ran[kind].seconds:.1f} s")
    assert ran[kind].seconds - ran["answers"].seconds < 30
