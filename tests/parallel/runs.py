"""Trainings of the tiny pair under a strategy, to be run on ranks."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

import distill.parallel  # noqa: F401  # its strategies by name
from distill.balance.fixed import FixedWeights
from distill.losses.class_weighted import FrequencyPower
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.parallel.deepspeed import DeepSpeedCPU
from tests import pair

STEPS = 20


def strategy(spec: str) -> Any:
    """Make a strategy: a name of Lightning's registry, or `ZeRO-3` with nothing kept whole, `ZeRO-2+offload` with its optimizer offloaded.

    The buckets are so small that every bucket is filled more than once, and no parameter is too small to be partitioned.
    """
    if not spec.startswith("ZeRO-"):
        return spec
    small = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
    zero: dict[str, Any] = {"stage": int(spec[5]), "stage3_prefetch_bucket_size": 500, **small}
    if spec.endswith("+offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    return DeepSpeedCPU({"zero_optimization": zero}, exclude_frozen_parameters=spec.endswith("+lora"))


class Record(pl.Callback):
    """Keeps the objective and the gradient's norm of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.start = 0  # the step that training resumes from

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step > self.start + len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def rich(folder: Path, **kwargs: Any) -> DistillModule:
    """The pair with class-weighted hard labels, soft labels and a projected hidden state, taken three tokens at a time."""
    losses = {"ce": CrossEntropy(class_weights=FrequencyPower(0.5)), "kd": ForwardKL(2.0), "hidden": HiddenMSE(projector="linear")}
    weights = FixedWeights({"ce": 0.3, "kd": 0.6, "hidden": 0.1})
    return pair.module(folder, **{"losses": losses, "balancer": weights, "chunk": 3} | kwargs)


def trainer(spec: str, ranks: int, **kwargs: Any) -> pl.Trainer:
    """A quiet trainer with two micro-batches a step and clipping."""
    warnings.filterwarnings("ignore")
    pl.seed_everything(1, verbose=False)
    given: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.15, "max_steps": STEPS, "log_every_n_steps": 1} | kwargs
    return pair.trainer(strategy=strategy(spec), devices=ranks, **given)


def digest(model: nn.Module) -> str:
    """sha256 of all weights."""
    state = sorted(model.state_dict().items())
    return hashlib.sha256(
        b"".join(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in state)
    ).hexdigest()


def teacher_of(module: DistillModule) -> nn.Module:
    assert module.teacher is not None
    return module.teacher.models()[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
