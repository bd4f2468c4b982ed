import torch
from torch import distributed

from distill.parallel.summed import summed
from tests.ranks import run_ranks


def both(value: float) -> tuple[float, bool]:
    distributed.init_process_group("gloo")
    given = torch.tensor(value + distributed.get_rank())
    return float(summed(given)), summed(given) is given


def test_the_sum_is_of_all_ranks_and_in_place() -> None:
    assert run_ranks(both, 2, 1.5) == [(4.0, True), (4.0, True)]
    alone = torch.tensor(7.0)
    assert summed(alone) is alone
    assert float(alone) == 7.0
