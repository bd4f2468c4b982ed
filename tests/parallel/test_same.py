import os

import pytest
import torch
from torch import nn

from distill.parallel.same import check_same, fingerprint
from distill.types import ConfigError
from tests.ranks import run_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_single_changed_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(dtype)
    before = fingerprint(model)
    assert len(before) == 4 + 3  # two weights, two biases; running mean, variance and count
    with torch.no_grad():
        model[0].weight[2, 3] = torch.nextafter(model[0].weight[2, 3], torch.tensor(9.0, dtype=dtype))
    assert (fingerprint(model) != before).tolist() == [True, *[False] * 6]


def _other_weights(differs: bool) -> str:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(int(os.environ["RANK"]) if differs else 0)
    try:
        check_same(nn.Linear(3, 3), "model.teacher", torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return "same"


@pytest.mark.parametrize("differs", [False, True])
def test_ranks_compare(differs: bool) -> None:
    expected = "model.teacher: ranks [1] hold other weights than rank 0" if differs else "same"
    assert all(found.startswith(expected) for found in run_ranks(_other_weights, 2, differs))
