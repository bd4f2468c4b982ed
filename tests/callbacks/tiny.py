"""A model, data and trainer of the smallest size that Lightning runs."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader


class Tiny(pl.LightningModule):
    """A linear layer; `on_train` and `on_val` are called once per micro-batch."""

    def __init__(self, on_train: Callable[[], Any] = lambda: None, on_val: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.on_train, self.on_val = on_train, on_val

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.on_train()
        loss = self.layer(next(iter(batch.values())).float()).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.on_val()
        self.log("val_loss", self.layer(next(iter(batch.values())).float()).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock:
    """Stands in for the `time` module; moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def loader(*keys: str) -> DataLoader:
    """Eight rows of four positions in four micro-batches; row i has 1 + i % 4 valid positions, 20 in all."""
    columns = {
        "input_ids": torch.arange(32).view(8, 4) % 7,
        "attention_mask": (torch.arange(4) <= torch.arange(8)[:, None] % 4).long(),
        "pixel_values": torch.ones(8, 4),
    }
    rows: Any = [{key: columns[key][i] for key in keys or ("input_ids", "attention_mask")} for i in range(8)]
    return DataLoader(rows, batch_size=2)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A trainer on the CPU with nothing but what is asked for."""
    bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    defaults = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return pl.Trainer(
        accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, enable_progress_bar=bar, **(defaults | options)
    )
