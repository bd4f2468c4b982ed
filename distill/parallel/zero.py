"""What is to be known of DeepSpeed before its engine is made: whether it is there, and how a model is cut up."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from distill.types import ConfigError

# The first release with two corrections of what ZeRO-1 and 2 with an offloaded optimizer lost of the gradient under accumulation:
# https://github.com/deepspeedai/DeepSpeed/pull/7967 and https://github.com/deepspeedai/DeepSpeed/pull/7981
FLOOR = "0.19.8"


def check_installed() -> None:
    """Make sure that there is a DeepSpeed that computes the right gradient.

    Raises:
        ConfigError: there is none, or an older one.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(f"trainer.strategy needs DeepSpeed, which is not installed: pip install 'deepspeed>={FLOOR}'") from None
    if Version(found) < Version(FLOOR):
        raise ConfigError(
            f"trainer.strategy needs DeepSpeed {FLOOR} or newer, found {found}, which loses gradients that are accumulated for an "
            f"offloaded optimizer: pip install 'deepspeed>={FLOOR}'"
        )


def without_shm() -> None:
    """Have DeepSpeed do without shared memory between CPU ranks: it would be compiled at the first start, which takes minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cut_up(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Leave every rank its part of each weight, one weight at a time, from where they are; buffers go to the device whole.

    `deepspeed.initialize` alone would first move the whole model to the device, which may have no room for it. What it then does no more,
    because it takes the model for one that was made in parts, is done here: cast the weights, and move the buffers.

    Args:
        model: whole and the same on every rank.
        config: DeepSpeed's, of stage 3.
        device: of this rank.
    """
    import deepspeed

    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = next((dtype for key, dtype in low.items() if config.get(key, {}).get("enabled")), None)
    for parameter in model.parameters():
        if kind and parameter.is_floating_point():
            parameter.data = parameter.data.to(kind)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
