"""A frozen model in shards: every rank keeps a part of its weights and gathers a layer while it runs."""

from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import Strategy
from torch import nn
from transformers import PreTrainedModel

from distill.parallel.zero import check_installed, cut_up, without_shm

# Lightning knows the engine of the student alone; this one is in no optimizer and no checkpoint


def sharded(model: PreTrainedModel, strategy: Strategy, keep: int = 100_000) -> PreTrainedModel:
    """Leave every rank `1 / world_size` of a frozen model's weights, by a ZeRO-3 engine of its own without an optimizer.

    The model is changed and given back. All ranks must run it equally often, and hold its head by `gather.gathered` while they apply it.

    Args:
        model: frozen, whole and the same on every rank.
        strategy: of the trainer; any that runs several ranks, whose process group is up.
        keep: weights with fewer elements stay whole on every rank: to gather them would take longer than to keep them.

    Raises:
        ConfigError: no DeepSpeed, or one that is too old.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model.to(strategy.root_device)
    check_installed()
    import deepspeed

    without_shm()
    deepspeed.init_distributed(dist.get_backend(), verbose=False)  # takes the group that there is
    zero = {"stage": 3, "stage3_param_persistence_threshold": keep}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if model.dtype in (torch.bfloat16, torch.float16):
        config["bf16" if model.dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    cut_up(model, config, strategy.root_device)
    args = Namespace(device_rank=getattr(strategy, "local_rank", 0))
    engine, *_ = deepspeed.initialize(args=args, config=config, model=model, model_parameters=[], dist_init_required=False)
    _begin_at(model.base_model, engine)
    return model


def _begin_at(trunk: nn.Module, engine: Any) -> None:
    # The engine learns the order of the layers, to gather them ahead, from one call of the whole model to the next. Here the trunk is
    # called in its place, and the head is applied chunk by chunk
    trunk.register_forward_pre_hook(lambda *_: engine.optimizer.get_param_coordinator().reset_step(), prepend=True)
