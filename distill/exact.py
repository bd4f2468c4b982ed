"""Buffers that a cast of the whole model must not round: what a model computes anew when it is loaded, such as rotary frequencies."""

import torch
from torch import Tensor, nn


def exact_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Give the floating buffers that no checkpoint holds, by dotted name, as they are now."""
    return {
        f"{path}.{name}" if path else name: buffer.detach().clone()
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_floating_point()
    }


def put_back(model: nn.Module, exact: dict[str, Tensor]) -> None:
    """Put those back, in place, whose dtype a cast has changed; where they lie now.

    `.to(bfloat16)` rounds a rotary model's frequencies to 8 bits: its angles are off by radians some thousand positions on, where the same
    weights loaded by transformers have them in float32.

    Args:
        model: that may have been cast since.
        exact: of it, see `exact_buffers`.
    """
    for dotted, buffer in exact.items():
        path, _, name = dotted.rpartition(".")
        module = model.get_submodule(path)
        now = module.get_buffer(name)
        if now.dtype != buffer.dtype:
            setattr(module, name, buffer.to(now.device))


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model, in place, but for these buffers: as transformers loads it in that dtype."""
    exact = exact_buffers(model)
    put_back(model.to(dtype), exact)
    return model
