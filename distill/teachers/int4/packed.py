"""A weight in 4 bits, two to a byte, on any device: torchao 0.18 keeps such a byte each, or wants a GPU's kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.utils import TorchAOBaseTensor

GROUP = 32


class PackedInt4(TorchAOBaseTensor):
    """`[out, in]` values `s · q`, with q from −8 to 7 and a scale s for every 32 values of a row.

    Args:
        packed: `[out, in / 2]`, uint8: q + 8 of two neighbours, the first in the low half.
        scale: `[out, in / 32]`, of the dtype that it stands for.
    """

    tensor_data_names = ["packed", "scale"]  # noqa: RUF012  # torchao's
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, packed: Tensor, scale: Tensor) -> "PackedInt4":
        """Look like a weight of the scale's dtype."""
        shape = (packed.shape[0], 2 * packed.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=packed.device, requires_grad=False)

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.packed, self.scale = packed, scale

    @classmethod
    def of(cls, weight: Tensor) -> "PackedInt4":
        """Round a weight `[out, in]`, 32 of whose columns share a scale `s = max|w| / 7.5`."""
        rounded = IntxUnpackedToInt8Tensor.from_hp(weight, (1, GROUP), torch.int4)  # type: ignore[attr-defined]  # it is there
        low, high = (rounded.qdata + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
        return cls(low | (high << 4), rounded.scale)

    def dequantize(self) -> Tensor:
        """Give `s · q`."""
        values = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).to(self.scale.dtype) - 8
        return (values.unflatten(1, (-1, GROUP)) * self.scale[..., None]).flatten(1)


@PackedInt4.implements(torch.ops.aten.linear.default)  # type: ignore[untyped-decorator]
@PackedInt4.implements_torch_function(linear)  # type: ignore[untyped-decorator]
def _(_func: Any, _types: Any, args: Any, kwargs: Any) -> Tensor:
    inputs, weight, *bias = args
    return linear(inputs, weight.dequantize(), *bias, **kwargs)
