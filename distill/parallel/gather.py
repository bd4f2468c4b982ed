"""Weights that ZeRO-3 keeps in parts on the ranks, made whole for as long as they are needed."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def gathered(first: nn.Module, *more: nn.Module) -> Iterator[nn.Module]:
    """Hold the weights of modules whole while the context is open; every rank must open it equally often. Gives the first module.

    Under ZeRO-3 a module gathers its weights at each call and lets them go after. What is called chunk by chunk, such as a head, would do
    so once a chunk, and ranks hang or stop with "disagreement on list length" as soon as they have different numbers of chunks. Here the
    weights are gathered once, and no call in between is ZeRO's (hooks of the modules are off). Weights that are trained stay whole until
    their gradient is there, for autograd will have it in the shape of the weight. Elsewhere nothing is done.

    Args:
        first: what is called inside; a backward pass through what it gave must follow, unless gradients are off.
        *more: what else is called inside.
    """
    modules = (first, *more)
    with ExitStack() as stack:
        stack.enter_context(whole((p for module in modules for p in module.parameters()), until_backward=torch.is_grad_enabled()))
        for each in {child for module in modules for child in module.modules()}:
            if hasattr(each, "ds_id"):  # DeepSpeed's mark of a module that it calls hooks on
                stack.enter_context(_without_hooks(each))
        yield first


@contextmanager
def whole(parameters: Iterable[nn.Parameter], until_backward: bool = False) -> Iterator[None]:
    """Hold parameters of ZeRO-3 whole, on every rank; do nothing where none is in parts.

    Args:
        parameters: of any kind, each any number of times.
        until_backward: whether those that are trained stay whole after the context, until their gradient was taken.
    """
    parts: list[Any] = list({p: None for p in parameters if hasattr(p, "ds_id")})
    if parts:
        parts[0].all_gather(param_list=parts)
    try:
        yield
    finally:
        for part in parts:
            if until_backward and part.requires_grad:
                _let_go_after_gradient(part)
            else:
                part.partition()


def _let_go_after_gradient(part: Any) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def let_go(_: Any) -> None:
        handle.remove()
        if part.ds_status == ZeroParamStatus.AVAILABLE and not part.ds_active_sub_modules:  # or a tied embedding will, or has
            part.partition()

    handle = part.register_post_accumulate_grad_hook(let_go)  # comes after DeepSpeed's, which takes the gradient away


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    # torch has no public way to call a module without its hooks
    before = module._forward_hooks, module._forward_pre_hooks
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks, module._forward_pre_hooks = before
