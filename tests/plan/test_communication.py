"""Bytes on the wire: by hand, by the paper, and counted on two ranks."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from distill.plan import communication
from distill.plan.counted import Collectives
from distill.plan.job import REPLICATED, STRATEGIES
from tests.plan.jobs import job, trained
from tests.ranks import run_ranks

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def sent(name: str, ranks: int = 8, **changes: Any) -> float:
    plan = job(trained(1000), precision="bf16-true", **changes)
    return communication.per_step(plan, next(s for s in STRATEGIES if s.name == name), ranks)


def test_a_ring_sends_each_part_to_every_other_rank_once_or_twice() -> None:
    assert communication.sent("all_reduce", 800, 8) == 2 * 700
    assert communication.sent("all_gather", 800, 8) == communication.sent("reduce_scatter", 800, 8) == 700
    assert communication.sent("all_reduce", 800, 1) == communication.sent("broadcast", 800, 1) == 0


def test_volumes_are_those_of_the_zero_paper_but_for_what_deepspeed_reduces_twice() -> None:
    unit = 2 * 1000 * 7 / 8  # Ψ in bytes, times (n − 1) / n
    assert sent("DDP") == 2 * unit
    assert sent("ZeRO-1") == sent("ZeRO-2") == (2 + 1) * unit  # the paper: 2
    assert sent("ZeRO-3") == 3 * unit


def test_what_is_sent_once_a_step_and_what_in_every_micro_batch() -> None:
    assert sent("DDP", accumulate=4) == sent("DDP")
    assert sent("ZeRO-1", accumulate=4) == sent("ZeRO-1")
    assert sent("ZeRO-2", accumulate=4) == (4 * 2 + 1) / 3 * sent("ZeRO-2")
    assert sent("ZeRO-3", accumulate=4) == 4 * sent("ZeRO-3")


def test_a_sharded_teacher_is_gathered_in_every_micro_batch() -> None:
    more = sent("DDP", teacher=trained(5000), teacher_sharded=True, accumulate=3) - sent("DDP", accumulate=3)
    assert more == 3 * 2 * 5000 * 7 / 8
    assert sent("DDP", teacher=trained(5000)) == sent("DDP")


def every_kind() -> tuple[Counter[str], Counter[str]]:
    """Call each collective, and DDP's reducer, while they are counted."""
    distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 5))
    for _ in range(2):  # DDP makes its buckets anew after the first step
        model(torch.ones(1, 10)).sum().backward()
    with Collectives() as seen:
        model(torch.ones(1, 10)).sum().backward()  # 55 values
        distributed.all_reduce(torch.ones(3, dtype=torch.bfloat16))
        distributed.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
        distributed.all_gather_into_tensor(torch.empty(8), torch.ones(4))
        distributed.reduce_scatter_tensor(torch.empty(4), torch.ones(8))
        distributed.broadcast(torch.ones(2, dtype=torch.int64), 0)
        distributed.barrier()
    distributed.all_reduce(torch.ones(3))  # after the counting
    return seen.bytes, seen.calls


def test_collectives_are_counted_whoever_calls_them() -> None:
    for size, calls in run_ranks(every_kind, 2):
        assert size == {"all_reduce": 55 * 4 + 3 * 2, "all_gather": 2 * 8 * 4, "reduce_scatter": 8 * 4, "broadcast": 16}
        assert calls == {"all_reduce": 2, "all_gather": 2, "reduce_scatter": 1, "broadcast": 1}


def trained_on_a_rank(strategy: str, accumulate: int, folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(BENCH))
    import communication as bench  # the script of that name

    os.environ["WORLD_SIZE"] = "2"
    found: dict[str, Any] = bench.train(strategy, "32-true", accumulate, folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "accumulate"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 1), ("zero3:0", 1), ("fsdp2", 2)])
def test_a_training_step_sends_what_the_formula_says(strategy: str, accumulate: int, tmp_path: Path) -> None:
    sys.path.insert(0, str(BENCH))
    try:
        import communication as bench

        bench.make(tmp_path)
    finally:
        sys.path.remove(str(BENCH))
    for found in run_ranks(trained_on_a_rank, 2, strategy, accumulate, tmp_path):
        for kind, size in found["formula"].items():
            assert found["bytes"][kind] == pytest.approx(size, rel=1e-3, abs=300), kind
        others = sum(size for kind, size in found["bytes"].items() if kind not in found["formula"])
        assert others < 1e-3 * sum(found["formula"].values()), found["bytes"]


def test_every_row_has_a_formula() -> None:
    plan = job(trained(1000))
    assert all(communication.per_step(plan, strategy, 2) > 0 for strategy in STRATEGIES)
    assert communication.per_step(plan, REPLICATED, 1) == 0
