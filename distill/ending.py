"""What comes after a run's training: its report, which can neither fail the run nor hold up its end."""

import signal
import sys
import traceback
from pathlib import Path

import pytorch_lightning as pl

from distill import signals
from distill.export.subjects import exported
from distill.module import DistillModule
from distill.report import whole
from distill.report.gather import Models, evidence, held_out, name_of
from distill.types import DistillError


def report(trainer: pl.Trainer, module: DistillModule, folder: Path, rows: int, wandb: str | None) -> None:
    """Write the report of a run that is complete; what goes wrong is said, and how to write it later.

    Args:
        trainer: that has trained.
        module: that it has trained.
        folder: of the run.
        rows: held-out rows to look at.
        wandb: project of Weights & Biases in which the run shows it; None for none.

    Raises:
        Stopped: by Ctrl-C. After any other signal the run has all that it needs, and is not to be queued again.
    """
    again = f"write it with: python train.py report {folder}"
    try:
        with signals.at_once():
            _write(trainer, module, folder, rows, wandb)
    except signals.Stopped as stop:
        came = signal.Signals(int(stop.code or 0) - 128)
        print(f"The run is complete; its report was stopped by {came.name}, {again}", file=sys.stderr, flush=True)
        if came == signal.SIGINT:
            raise
    except Exception as error:  # the run is done and safe
        if not isinstance(error, DistillError | OSError):  # a disk that is full says all there is to say
            traceback.print_exc(file=sys.stderr)
        print(f"The run is complete, its report is not: {error}. Once that is mended {again}", file=sys.stderr, flush=True)


def _write(trainer: pl.Trainer, module: DistillModule, folder: Path, rows: int, wandb: str | None) -> None:
    models = Models(module, folder, trainer.strategy.root_device)
    models.add_all(name_of(module))
    exports = exported(folder, models.task, held_out(module.data, 1)[0], models.absent)
    found = evidence(models, name_of(module), rows, exports)
    print(f"The report is {whole.write(found, wandb=wandb)}")
