"""The numbers of a run: a file with a line per log, and how fast tokens go by."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from distill.pair import Pair
from distill.types import Batch


class JsonlLogger(Logger):
    """Append every log to `metrics.jsonl` as one line of JSON: `{"step": 49, "time": 12.3, "loss": 4.8, …}`.

    `step` is Lightning's, which counts optimizer steps from 0. `time` is in seconds since the run began; a resumed run goes on from
    the last line's time, so that the time between a kill and the resume does not count. A run resumed from a checkpoint older
    than its last line logs some steps again: the later line is the valid one. Values that are not finite have no number in JSON
    and are written as the strings "nan", "inf" and "-inf", which `float()` reads back. Only rank zero writes.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self._start = time.monotonic()
        self._before: float | None = None  # seconds that earlier processes of this run took; None until the file was looked at

    @property
    def name(self) -> str:
        """Empty, so that Lightning adds no folders of its own."""
        return ""

    @property
    def version(self) -> str:
        """Empty, so that Lightning adds no folders of its own."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; the file is closed after each, so a kill loses at most the line being written."""
        if self._before is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._before = _mend(self.path)
        seconds = round(self._before + time.monotonic() - self._start, 3)
        line = {"step": step, "time": seconds} | {name: _jsonable(value) for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _mend(path: Path) -> float:
    """Drop a last line that a kill has torn, and give the time of the last whole one, in seconds."""
    if not path.exists():
        return 0.0
    with path.open("r+b") as file:
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        file.truncate(len(whole))
    lines = whole.splitlines()
    return float(json.loads(lines[-1])["time"]) if lines else 0.0


class Throughput(pl.Callback):
    """Log `tokens_per_s`: non-padding input positions per second of training, of all ranks together; and `teacher_share`, the part of the
    step at hand that the teacher's forward pass took.

    `(sum of attention_mask, or of input positions where the batch has no mask) · world_size / seconds`, over the optimizer steps
    between two logs (`trainer.log_every_n_steps`), validation excluded. The other ranks are taken to be as fast as this one,
    which spares a collective; the count stays on the device until it is logged, which spares a synchronisation per micro-batch.
    Batches without `input_ids`, such as images, have no tokens, and nothing is logged for them.
    """

    def __init__(self) -> None:
        self._tokens: torch.Tensor | int = 0
        self._step = 0
        self._since = self._paused = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._tokens, self._step, self._since = 0, trainer.global_step, time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the clock."""
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count a micro-batch; at the optimizer steps that Lightning logs, log the rate."""
        if "input_ids" not in batch:
            return
        self._tokens = self._tokens + (batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        if not stepped or not every or self._step % every:
            return
        tokens = int(self._tokens)  # waits for the device, so the clock is read after the step's work, not after its launch
        now = time.perf_counter()
        pl_module.log("tokens_per_s", tokens * trainer.world_size / (now - self._since), prog_bar=True)
        if isinstance(pl_module, Pair) and pl_module.teacher_share is not None:
            pl_module.log("teacher_share", pl_module.teacher_share)
        self._tokens, self._since = 0, now
