"""One process, DDP, ZeRO and FSDP2 train the same student from the same batches."""

from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch

from distill.balance.gradnorm import GradNorm
from distill.exact import exact_buffers
from distill.parallel.through import through
from distill.parallel.weights import whole_state_dict
from tests import pair
from tests.parallel import runs
from tests.ranks import run_ranks

SOME_STEPS = 8  # bf16 is slow on most CPUs, and so are exact norms


class Curve(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    measured: list[float]
    teacher_moved: bool


def train(folder: Path, spec: str, ranks: int, precision: str = "32-true", exact_every: int | None = None) -> Curve:
    """Train on a global batch of 8; balanced by gradient norms where `exact_every` is given."""
    balancer = {} if exact_every is None else {"balancer": GradNorm(every=1, exact_every=exact_every)}
    module, record = runs.rich(folder, **balancer), runs.Record()
    data = pair.data(folder, batch_size=4 // ranks, seed=1)
    steps = runs.STEPS if precision == "32-true" and exact_every is None else SOME_STEPS
    trainer = runs.trainer(spec, ranks, precision=precision, callbacks=[record], max_steps=steps)
    before: list[str] = []
    record.on_train_start = lambda *_: before.append(runs.digest(runs.teacher_of(module)))  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data)
    moved = before != [runs.digest(runs.teacher_of(module))]
    assert module.student is not None
    weights, student = whole_state_dict(trainer, module), whole_state_dict(trainer, module.student)
    assert all(torch.equal(weights[f"student.{name}"], weight) for name, weight in student.items())
    assert {buffer.dtype for buffer in exact_buffers(module.student).values()} == {torch.float32}, "no strategy's cast rounds angles"
    return Curve(record.losses, record.norms, weights, measured(trainer), moved)


def measured(trainer: pl.Trainer) -> list[float]:
    """Loss and count over the validation rows of all ranks, outside of Lightning's loops."""
    sums = torch.zeros(2)
    with torch.no_grad():
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            found = through(trainer, "measures", batch)
            sums += torch.tensor([float(found["loss"]), float(found["count"])])
    return [float(value) for value in trainer.strategy.reduce(sums, reduce_op="sum")]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Curve:
    return run_ranks(train, 1, folder, "auto", 1)[0]


@pytest.fixture(scope="module")
def alone_in_bf16(folder: Path) -> Curve:
    return run_ranks(train, 1, folder, "auto", 1, "bf16-mixed")[0]


def largest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3+offload", "fsdp2"])
def test_two_ranks_are_one_process(spec: str, folder: Path, alone: Curve) -> None:
    assert len(alone.losses) == runs.STEPS
    assert alone.losses[-1] < alone.losses[0]
    assert sum(norm > 0.15 for norm in alone.norms) > 5  # clipping has something to do
    first, second = run_ranks(train, 2, folder, spec, 2)
    for curve in (first, second):
        assert largest(alone.losses, curve.losses) <= 1e-5
        assert largest(alone.norms, curve.norms) <= 1e-5
        assert curve.measured == pytest.approx(alone.measured, rel=1e-4)
        assert not curve.teacher_moved
    assert second.weights == {}
    assert first.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        torch.testing.assert_close(first.weights[name], weight, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ddp", "ZeRO-2", "ZeRO-3", "fsdp2"])
def test_in_bf16_as_well(spec: str, folder: Path, alone_in_bf16: Curve) -> None:
    first, _ = run_ranks(train, 2, folder, spec, 2, "bf16-mixed")
    assert largest(alone_in_bf16.losses, first.losses) <= 1e-2
    assert {weight.dtype for weight in first.weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("exact_every", "specs"), [(3, ["ddp", "ZeRO-2"]), (0, ["ZeRO-3", "fsdp2"])])
def test_balanced_as_well(exact_every: int, specs: list[str], folder: Path) -> None:
    """Norms at the branch points everywhere; those on the parameters where these are whole."""
    (alone,) = run_ranks(train, 1, folder, "auto", 1, "32-true", exact_every)
    for spec in specs:
        first, _ = run_ranks(train, 2, folder, spec, 2, "32-true", exact_every)
        assert largest(alone.losses, first.losses) <= 1e-4, spec
