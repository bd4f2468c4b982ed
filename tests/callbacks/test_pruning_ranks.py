"""Masks, learned scores and their penalty on two ranks, with weights whole and in shards."""

import hashlib
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor

from distill.callbacks.masking import Masking
from distill.callbacks.pruning import Pruning
from distill.callbacks.soft_movement import SoftMovementPruning
from distill.compress.mask import masks_of
from distill.parallel.weights import whole_state_dict
from distill.report import student as report
from distill.students.load import FromConfig
from tests import pair
from tests.callbacks.test_pruning import GROUPED
from tests.parallel import runs
from tests.ranks import run_ranks

STEPS = 8


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    masks: str
    sparsities: list[float]
    saved: dict[str, Tensor]


def prunings() -> list[Masking]:
    """One of each kind, on linears of their own, and whole layers."""
    when = {"begin": 0.25, "end": 0.75, "every": 1}
    return [
        Pruning(0.6, "movement", scope="global", include=["*mlp*"], **when),  # type: ignore[arg-type]
        Pruning(0.5, "wanda", include=["*q_proj"], **when),  # type: ignore[arg-type]
        Pruning(0.5, "displacement", include=["*k_proj"], **when),  # type: ignore[arg-type]
        SoftMovementPruning(penalty=50.0, rate=40.0, include=["*o_proj"], begin=0.0, end=0.5, every=1),
        Pruning(0.5, "magnitude", structure="layers", **when),  # type: ignore[arg-type]
    ]


def train(folder: Path, spec: str, ranks: int) -> Trained:
    """Train on a global batch of 4, twice accumulated, with clipping."""
    callbacks, record = prunings(), runs.Record()
    module = pair.module(folder, student=FromConfig(GROUPED))
    trainer = runs.trainer(spec, ranks, max_steps=STEPS, callbacks=[*callbacks, record])
    teacher: list[str] = []
    record.on_train_start = lambda *_: teacher.append(runs.digest(runs.teacher_of(module)))  # type: ignore[method-assign]
    trainer.fit(module, datamodule=pair.data(folder, batch_size=4 // ranks, seed=1))
    assert teacher == [runs.digest(runs.teacher_of(module))]
    assert module.student is not None
    found = [mask.mask for callback in callbacks for _, mask in masks_of(module.student, callback.pruner.owner).values()]
    masks = hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in found)).hexdigest()
    weights = whole_state_dict(trainer, module.student)
    sparsities = [callback.figures()["sparsity"] for callback in callbacks]
    report.save(trainer, module, folder / f"{spec}-{ranks}")
    again = report.whole(trainer, module)[0]
    saved = report.deployed(module, again).state_dict() if trainer.is_global_zero else {}
    return Trained(record.losses, record.norms, weights, masks, sparsities, {name: value.clone() for name, value in saved.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = cast(Path, tmp_path_factory.mktemp("pruning"))
    pair.data(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Trained:
    return cast(Trained, run_ranks(train, 1, folder, "auto", 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ddp", "ZeRO-2", "ZeRO-3", "fsdp2"])
def test_two_ranks_are_one_process(spec: str, folder: Path, alone: Trained) -> None:
    assert alone.sparsities[:3] == pytest.approx([0.6, 0.5, 0.5], abs=1e-3)
    assert 0 < alone.sparsities[3] < 1
    assert alone.sparsities[4] == 0.5
    assert alone.saved["model.layers.0.mlp.up_proj.weight"].count_nonzero() < 512
    assert "model.layers.1.mlp.up_proj.weight" not in alone.saved, "one of two layers is left"
    first, second = run_ranks(train, 2, folder, spec, 2)
    assert first.masks == second.masks == alone.masks
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)
    assert first.norms == pytest.approx(alone.norms, abs=1e-5)
    assert first.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        torch.testing.assert_close(first.weights[name], weight, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for name, weight in alone.saved.items():
        torch.testing.assert_close(first.saved[name], weight, rtol=0, atol=1e-4)
