import math

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from distill.parallel.deepspeed import DeepSpeedCPU
from distill.parallel.fsdp import FSDP2
from distill.parallel.gradients import gradient_norm, shards_parameters


def test_the_norm_is_that_of_all_gradients_together() -> None:
    one, other, without = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 2), (3,)))
    assert gradient_norm([without]) == 0.0
    one.grad, other.grad = torch.tensor([3.0, 4.0]), torch.tensor([[12.0, 84.0]])
    assert gradient_norm([one, without, other]) == pytest.approx(math.hypot(3, 4, 12, 84)) == pytest.approx(85.0)


def test_whose_parameters_are_in_shards() -> None:
    assert [shards_parameters(DeepSpeedCPU(stage=stage)) for stage in (1, 2, 3)] == [False, False, True]
    assert shards_parameters(FSDP2())
    assert not shards_parameters(SingleDeviceStrategy())
