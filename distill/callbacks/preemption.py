"""Stopping when a signal asks for it: on all ranks at the same step, with a checkpoint, and back into Slurm's queue."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed

from distill import signals, slurm
from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.wandb import Tracked


class Preemption(pl.Callback):
    """Looks at the signals that came, at the end of every optimizer step and of every validation batch.

    The ranks agree by an all-reduce MAX of the signal's number, one integer, so that all stop at the same step however far apart the
    signal reached them. Then the checkpoint is saved by `Checkpoints`; after SIGUSR1 and SIGTERM rank zero puts a Slurm job back into
    the queue; and training ends by `signals.Stopped`, whose exit status is 128 + the signal's number. Lightning's own handlers are left
    out: on SIGTERM they broadcast from inside the handler, which deadlocks where a rank is late, and save nothing.

    Between the optimizer steps of an accumulation window nothing is looked at: a checkpoint would lose the window's gradients. A signal
    must therefore come earlier than the end by the time of one step and one save.

    Args:
        folder: of the run, for the line that says how to go on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._step = 0
        self._validating = False
        self._asked = 0
        self._saved: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning's handlers out, and stop where a signal came during the imports: the ranks can talk to each other from here on."""
        # Private, and the only way in: Lightning takes SIGTERM for itself whatever handler there is, and asks no plugin; and it
        # broadcasts what its handler noted at every micro-batch, waiting for the device.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.leave_if_asked(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop where a signal came while the models were loaded and measured."""
        self._step = trainer.global_step
        self.leave_if_asked(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Agree and save at the end of an optimizer step; training ends once Lightning has logged the step's metrics, which comes next."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._agree_and_save(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, if that is settled."""
        self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, if that is settled."""
        self._leave(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Agree, save and leave in the midst of a validation, which a resumed run begins anew."""
        if not trainer.sanity_checking:
            self._validating = True
            self._agree_and_save(trainer)
            self._validating = False
            self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, if that is settled: measuring at the end may take long, and a resumed run does it."""
        self._leave(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In the midst of a validation, let Lightning take the checkpoint for one made in its first batch, so that it begins anew."""
        if self._validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(ready=1, started=1, processed=0, completed=0)

    def leave_if_asked(self, trainer: pl.Trainer) -> None:
        """Agree and leave without saving. Collective: for phases in which nothing has been learned since the last checkpoint.

        Raises:
            Stopped: a signal came on some rank.
        """
        self._asked = self._asked or agree(trainer)
        self._leave(trainer)

    def _agree_and_save(self, trainer: pl.Trainer) -> None:
        if asked := agree(trainer):
            again = self._validating  # the one of this step, if there is one, would skip the rest of the validation
            found = (c.save(trainer, again) for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
            self._saved = next(found, None)
            self._asked = asked

    def _leave(self, trainer: pl.Trainer) -> None:
        if not self._asked:
            return
        requeued = slurm.job() is not None and self._asked != signal.SIGINT
        if trainer.is_global_zero:
            where = f"saved {self._saved}" if self._saved else "nothing was learned since the last checkpoint"
            stopped = f"Stopped by {signal.Signals(self._asked).name} at step {trainer.global_step}; {where}."
            # in one piece: Slurm writes into the same file
            print(f"{stopped} {slurm.requeue() if requeued else self._go_on()}", file=sys.stderr, flush=True)
        for logger in trainer.loggers if self._asked != signal.SIGINT else []:
            if isinstance(logger, Tracked):
                logger.preempted()
        trainer.strategy.barrier("preemption: requeued")  # a rank that exits may take the others along, the one that requeues included
        # one rank tells the launcher; a status from another would make it kill rank 0, which may still be sending its last figures
        raise signals.Stopped(128 + self._asked if trainer.is_global_zero else 0)

    def _go_on(self) -> str:
        if self._saved or any((self.folder / "checkpoints").glob("*.ckpt")):
            return f"Go on from the last checkpoint with --config {self.folder / 'config.yaml'} --ckpt_path last"
        return "No checkpoint was saved yet."


def agree(trainer: pl.Trainer) -> int:
    """The number of the signal that came on any rank, 0 where none has; collective."""
    if trainer.world_size == 1:
        return signals.received()
    number = torch.tensor(signals.received(), device=trainer.strategy.root_device)
    distributed.all_reduce(number, distributed.ReduceOp.MAX)  # the strategy's own reduce puts a barrier before it
    return int(number)
