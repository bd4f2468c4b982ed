"""How far training has come: a bar on a terminal, plain lines in a log file."""

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

from distill.types import ConfigError


def progress_callback() -> ProgressBar:
    """Choose a bar where stdout is a terminal, and lines elsewhere (Slurm, CI, a pipe)."""
    return StepBar() if sys.stdout.isatty() else ProgressLines()


class ProgressLines(ProgressBar):
    """Print one plain line every few seconds, and at the first and the last step.

    `step 120/300 · loss 4.812 · ce 5.01 · kd 2.33 · 21.3k tokens/s · 0:41 left`: what is logged with `prog_bar=True`, and the time left,
    `(total - step) · seconds / steps`, with the seconds and steps of this process only, so that a resumed run is not flattered.
    Being a `ProgressBar`, it stops Lightning from adding its own. Put it after the callbacks whose numbers it shall show fresh.

    Args:
        every_s: seconds between two lines, > 0.

    Raises:
        ConfigError: `every_s` is not positive.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        if not every_s > 0:
            raise ConfigError(f"every_s must be > 0, got {every_s}; it is the number of seconds between two lines")
        self.every_s = every_s
        self._enabled = True
        self._first_step = self._printed_step = 0
        self._start = self._due = 0.0

    def disable(self) -> None:
        """Print nothing from now on; Lightning calls it on ranks other than zero."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock at the step that training starts from."""
        self._first_step = self._printed_step = trainer.global_step
        self._start = self._due = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print a line if one is due and an optimizer step was taken since the last."""
        if time.monotonic() >= self._due:
            self._line(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last step."""
        self._line(trainer, pl_module)

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, total, now = trainer.global_step, _total_steps(trainer), time.monotonic()
        if not self._enabled or step == self._printed_step:
            return
        parts = [f"step {step}/{total}" if math.isfinite(total) else f"step {step}"]
        for name, value in trainer.progress_bar_metrics.items():
            parts.append(f"{_number(name, value)} {_unit(name)}" if _is_rate(name) else f"{name} {_number(name, value)}")
        if math.isfinite(total):
            parts.append(f"{_clock((total - step) * (now - self._start) / (step - self._first_step))} left")
        print(" · ".join(parts), flush=True)
        self._printed_step, self._due = step, now + self.every_s


class StepBar(RichProgressBar):
    """Lightning's rich bar over the optimizer steps of the whole training, where Lightning's counts the micro-batches of an epoch."""

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps in all."""
        return _total_steps(self.trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the bar in the first epoch; later ones go on with it, where Lightning's would start again from 0."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar to the optimizer step; Lightning's adds 1 to the index that it is given."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Give the numbers beside the bar, short."""
        return {_unit(name): _number(name, value) for name, value in super().get_metrics(trainer, pl_module).items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"  # Lightning's is 'Epoch 0/-2' where only max_steps bounds training


def _total_steps(trainer: pl.Trainer) -> int | float:
    total = trainer.estimated_stepping_batches
    return total if total > 0 else math.inf  # -1 is Lightning's unknown, for a stream without max_steps


def _is_rate(name: str) -> bool:
    return name.endswith("_per_s")


def _unit(name: str) -> str:
    return name.replace("_per_s", "/s") if _is_rate(name) else name


def _number(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not _is_rate(name) or value < 1000:
        return f"{float(value):.4g}"
    return f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.1f}M"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
