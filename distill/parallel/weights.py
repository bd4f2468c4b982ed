"""The student's weights, whole, from whatever strategy trains it."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from distill.parallel.gather import whole


def whole_state_dict(trainer: pl.Trainer, module: nn.Module) -> dict[str, Tensor]:
    """Give a module's state dict, whole, on the CPU, floating-point weights in float32, on rank 0; empty on the others.

    Under DeepSpeed trained weights are those that the optimizer keeps in float32, whatever the model runs in. One weight at a time is
    whole on a device. All ranks must call.

    Args:
        trainer: of the module.
        module: the one that is trained, or a part of it, e.g. its student.
    """
    strategy = trainer.strategy
    full: Mapping[str, Any]
    if isinstance(strategy, ModelParallelStrategy):
        full = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif isinstance(strategy, DeepSpeedStrategy):
        full = _of_deepspeed(module)
    else:
        full = module.state_dict()
    return {name: _wide(tensor) for name, tensor in full.items()} if strategy.is_global_zero else {}


def _of_deepspeed(module: nn.Module) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    full = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in module.state_dict().items():
        if name in parameters and (master := safe_get_full_fp32_param(parameters[name])) is not None:
            full[name] = master.detach().cpu().clone()
            continue
        with whole([parameters[name]] if name in parameters else []):
            full[name] = parameters.get(name, tensor).detach().cpu().clone()
    return full


def _wide(tensor: Any) -> Tensor:
    return tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()
