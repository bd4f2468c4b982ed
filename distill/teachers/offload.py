"""A frozen model whose weights live on the CPU and are on the device only while it runs."""

from typing import Any

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


class Visits:
    """Copy the trunk's weights to a device whenever it is called, and let the copies go after; a context that does the same.

    The head stays on the device, for it is applied chunk by chunk after the trunk has run; so does what both share. Nothing is copied back:
    the weights are frozen. On the CPU nothing is done at all.

    Args:
        model: frozen, on the CPU; its trunk is given hooks.
        head: what is called later.
        device: where the trunk runs.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module, device: torch.device) -> None:
        self.device = device
        self.homes: list[tuple[nn.Module, str, nn.Parameter]] = []
        if device.type == "cpu":
            return
        trunk: nn.Module = model.base_model
        of_head = {id(p) for p in head.parameters()}
        visiting = {id(p) for p in trunk.parameters() if id(p) not in of_head}
        self.homes, stays = _places(model, visiting), _places(model, {id(p) for p in model.parameters()} - visiting)
        for *_, weight in self.homes:
            if device.type == "cuda" and not is_traceable_wrapper_subclass(weight.data):
                weight.data = weight.data.pin_memory()  # so that a copy does not wait
        self._place(stays)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        trunk.register_forward_pre_hook(self._come, with_kwargs=True)
        trunk.register_forward_hook(self._go, always_call=True)

    def __enter__(self) -> None:
        """Copy the weights to the device."""
        self._place(self.homes)

    def __exit__(self, *_: object) -> None:
        """Put those of the CPU back into their places."""
        for module, name, home in self.homes:
            setattr(module, name, home)

    def _place(self, places: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        copies: dict[int, nn.Parameter] = {}  # a weight that two modules share is copied once
        for module, name, weight in places:
            if id(weight) not in copies:
                copies[id(weight)] = nn.Parameter(weight.detach().to(self.device, non_blocking=True), requires_grad=False)
            setattr(module, name, copies[id(weight)])

    def _come(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.__enter__()
        return move_data_to_device((args, kwargs), self.device)  # whoever looks where the weights are sees the CPU

    def _go(self, *_: Any) -> None:
        self.__exit__()


def _places(model: nn.Module, wanted: set[int]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    named = ((module, name, p) for module in model.modules() for name, p in module.named_parameters(recurse=False))
    return [place for place in named if id(place[2]) in wanted]
