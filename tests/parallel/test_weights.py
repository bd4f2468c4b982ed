import torch
from torch import nn

from distill.parallel.weights import whole_state_dict
from tests import pair


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, -2.25], dtype=torch.bfloat16))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(2**40))


def test_floats_become_float32_and_nothing_else_does() -> None:
    found = whole_state_dict(pair.trainer(), Mixed())
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        "weight": (torch.float32, [1.5, -2.25]),
        "flag": (torch.bool, [True, False]),
        "count": (torch.int64, 2**40),
    }
    assert not found["weight"].requires_grad
