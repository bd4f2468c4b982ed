"""When a checkpoint is saved, and which ones are kept."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from distill import checkpoints
from distill.callbacks import rng
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.parallel.folder import together
from distill.types import ConfigError, TrainingError


class Checkpoints(Checkpoint):
    """Saves `step-00000100.ckpt` every so many optimizer steps, at the end, and when asked; keeps the newest ones.

    Whether it is written while training goes on is the matter of the trainer's `AtomicCheckpointIO` or `AsyncCheckpointIO`. Beside what
    Lightning, the data and the module put into a checkpoint, this adds the random number generators of all ranks, as they stood after the
    last optimizer step: a checkpoint made in the middle of an accumulation window goes on at the window's beginning.

    Args:
        folder: where they go, e.g. `runs/NAME/checkpoints`.
        every: optimizer steps between two saves, ≥ 1.
        keep: how many stay, ≥ 1.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, folder: Path, every: int = 100, keep: int = 2) -> None:
        for key, value in (("save_every", every), ("keep", keep)):
            if value < 1:
                raise ConfigError(f"{key} must be at least 1, got {value}; trainer.enable_checkpointing=false saves nothing at all")
        self.folder, self.every, self.keep = folder, every, keep
        self._saved: Path | None = None
        self._step = 0
        self._rng: dict[str, Any] = {}  # after step `_step`
        self._loaded_rng: list[dict[str, Any]] = []

    def save(self, trainer: pl.Trainer, again: bool = False) -> Path:
        """Save now, and return when it is published; all ranks must call, at the end of a micro-batch.

        Args:
            trainer: whose.
            again: whether to replace this step's checkpoint where it is there already; otherwise nothing is done then.

        Raises:
            TrainingError: the disk refuses, now or for an earlier one that was being written.
        """
        target = self._save(trainer, again)
        with together(trainer.strategy, f"cannot save the checkpoint '{target}'", TrainingError):  # rank 0 alone writes meanwhile
            self._wait(trainer)
        self._retire(trainer)
        return target

    def _save(self, trainer: pl.Trainer, again: bool = False) -> Path:
        target = self.folder / checkpoints.name_of(trainer.global_step)
        if again or target != self._saved:
            trainer.save_checkpoint(target)
            self._saved = target
            self._retire(trainer)
        return target

    def _retire(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            checkpoints.retire(self.folder, self.keep)

    def _wait(self, trainer: pl.Trainer) -> None:
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO):
            io.wait()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear what a killed process left half-written; set the random number generators, after all other callbacks."""
        if trainer.is_global_zero:
            checkpoints.sweep(self.folder)
        here = self.folder / checkpoints.name_of(trainer.global_step)
        # rank 0's word: another rank may have been given another path, see AtomicCheckpointIO.load_checkpoint
        loaded = trainer.strategy.broadcast(str(trainer.ckpt_path or ""))
        self._saved = here if loaded and Path(loaded).absolute() == here.absolute() else None
        if len(self._loaded_rng) == trainer.world_size:  # there is no right state for another number of ranks
            rng.restore(self._loaded_rng[trainer.global_rank])
        self._loaded_rng = []
        self._step, self._rng = trainer.global_step, rng.state()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save where it is time; once after each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step, self._rng = trainer.global_step, rng.state()
        if self._step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end, while the weights are still where they were trained."""
        self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let what is being written be finished; should it fail, say so beside what stopped the training."""
        try:
            self._wait(trainer)
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random number generators of all ranks."""
        ahead = self._step != trainer.global_step  # asked by a callback that comes before this one
        checkpoint["rng"] = rng.gather(rng.state() if ahead else self._rng)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take them, for the moment when training starts."""
        self._loaded_rng = checkpoint.get("rng", [])
