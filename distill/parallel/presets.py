"""Strategies by name: `trainer.strategy: zero2`."""

import os
from typing import Any

import torch
from pytorch_lightning.strategies import Strategy, StrategyRegistry

from distill.parallel.deepspeed import DeepSpeed, DeepSpeedCPU
from distill.parallel.fsdp import FSDP2

OFFLOAD: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
NVME: dict[str, Any] = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}


def zero(**kwargs: Any) -> Strategy:
    """Make the DeepSpeed strategy for the accelerator that DeepSpeed finds here."""
    on_cpu = os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu") == "cpu"
    return (DeepSpeedCPU if on_cpu else DeepSpeed)(**kwargs)


StrategyRegistry.register("zero1", zero, "ZeRO-1: the optimizer's state is partitioned", stage=1)
StrategyRegistry.register("zero2", zero, "ZeRO-2: gradients as well", stage=2)
StrategyRegistry.register("zero3", zero, "ZeRO-3: parameters as well", stage=3)
StrategyRegistry.register("zero3_offload", zero, "ZeRO-3 with optimizer and parameters in the CPU's memory", stage=3, **OFFLOAD)
StrategyRegistry.register("zero3_offload_nvme", zero, "ZeRO-3 with optimizer and parameters on NVMe", stage=3, **OFFLOAD, **NVME)
StrategyRegistry.register("fsdp2", FSDP2, "FSDP2: parameters, gradients and the optimizer's state in shards")
