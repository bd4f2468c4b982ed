"""Counts the bytes that go through each collective of `torch.distributed`, whoever calls it: DDP's reducer, DeepSpeed, FSDP, Lightning."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # private, as torch's own CommDebugMode, which does not know DDP's

# The operators of the c10d library that move data, by what they do
KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
}


class Collectives(TorchDispatchMode):
    """While it is entered, adds up the bytes of the whole (what is reduced, has been gathered, is scattered) by kind.

    Attributes:
        bytes: by kind, as `communication.sent` takes them.
        calls: how often each was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operator on its way."""
        name = function._schema.name.removeprefix("c10d::")
        if function.namespace == "c10d" and name in KINDS:
            self.bytes[KINDS[name]] += max(_size(arg) for arg in args)
            self.calls[KINDS[name]] += 1
        return function(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
