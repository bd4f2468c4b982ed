"""Optimizers with their learning-rate schedule."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers import get_scheduler

from distill.types import ConfigError


class Optimizer(ABC):
    """Makes the optimizer and its schedule once the student and the number of steps are known."""

    @abstractmethod
    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]], total_steps: int) -> dict[str, Any]:
        """Give what `configure_optimizers` of Lightning returns, the schedule stepped after every optimizer step."""


class AdamW(Optimizer):
    """AdamW with decoupled weight decay on matrices only, a linear warm-up, and a decay to `min_lr_ratio · lr`.

    Biases and gains of normalisation layers (fewer than two dimensions) are not decayed: decay pulls them to 0, where a gain means "off".

    Args:
        lr: peak learning rate, > 0.
        weight_decay: λ ≥ 0 of Loshchilov & Hutter 2019, arXiv 1711.05101.
        betas: decay rates of the two moments.
        warmup: optimizer steps of warm-up when ≥ 1, else their share of all steps.
        schedule: what follows the warm-up.
        min_lr_ratio: where cosine and linear end, as a share of `lr`.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.05,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        min_lr_ratio: float = 0.1,
    ) -> None:
        for name, value, fine in (
            ("lr", lr, lr > 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("warmup", warmup, warmup >= 0),
            ("min_lr_ratio", min_lr_ratio, 0 <= min_lr_ratio < 1),
        ):
            if not fine:
                raise ConfigError(f"optimizer: {name} is out of range, got {value}")
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup, self.schedule, self.min_lr_ratio = warmup, schedule, min_lr_ratio

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]], total_steps: int) -> dict[str, Any]:
        """Split the trainable parameters into decayed and not decayed, and attach the schedule."""
        params = [p for _, p in named_parameters if p.requires_grad]
        if not params:
            raise ConfigError("nothing to train: no parameter of the student wants a gradient")
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.device.type == "cpu" for p in params) or None  # one pass over the memory; on a GPU torch chooses
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, fused=fused)
        # else Lightning refuses to clip under autocast; a GradScaler unscales before the step then, as it does for any optimizer
        optimizer._step_supports_amp_scaling = False
        steps = int(self.warmup if self.warmup >= 1 else self.warmup * total_steps)
        if steps > total_steps:
            raise ConfigError(
                f"optimizer: warmup takes {steps} steps, but training has {total_steps}; lower it, or give it as a share below 1"
            )
        name = {"cosine": "cosine_with_min_lr", "linear": "polynomial", "constant": "constant_with_warmup"}[self.schedule]
        ends = {"cosine": {"min_lr_rate": self.min_lr_ratio}, "linear": {"lr_end": self.lr * self.min_lr_ratio, "power": 1.0}}
        scheduler = get_scheduler(name, optimizer, steps, total_steps, scheduler_specific_kwargs=ends.get(self.schedule, {}))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
