"""What is measured of each term: its gradient's norm at the branch point and on the parameters, however the batch is cut."""

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from distill.balance.base import Balancer, Measured
from distill.callbacks.metrics import JsonlLogger
from distill.losses.base import Loss
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.students.load import FromConfig
from distill.types import Batch, Outputs
from tests import pair
from tests.ranks import run_ranks

LAYER, INPUT = "model.layers.0", "model.layers.0:input"


class Spy(Balancer):
    """Fixed weights that keep what they are told."""

    exact_every = 2

    def __init__(self, hidden: float = 3.0) -> None:
        self.seen: list[Measured] = []
        self.hidden = hidden

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        return {name: self.hidden if name == "hidden" else 0.5 for name in names}

    def wants_norms(self, step: int) -> bool:
        return True

    def update(self, measured: Measured) -> None:
        self.seen.append(measured)


class Size(Loss):
    """Squared activations, from two taps; two terms share one of them."""

    needs_teacher = False

    def __init__(self, *taps: str) -> None:
        super().__init__()
        self.student_taps = taps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        valid = batch["labels"] != -100
        return torch.stack([student.taps[tap][valid].float().pow(2).mean(-1).sum() for tap in self.student_taps]).sum()


def terms() -> dict[str, Any]:
    return {"ce": CrossEntropy(), "kd": ForwardKL(2.0), "hidden": Size(INPUT, LAYER), "last": Size(LAYER)}


def fit(tmp_path: Path, batch_size: int = 8, checkpointing: bool = False, hidden: float = 3.0, **kwargs: Any) -> tuple[DistillModule, Spy]:
    pl.seed_everything(0, verbose=False)
    spy = Spy(hidden)
    student = FromConfig(pair.STUDENT, gradient_checkpointing=checkpointing)
    module = pair.module(tmp_path, losses=terms(), balancer=spy, student=student)
    pair.trainer(**({"max_steps": 3} | kwargs)).fit(module, pair.data(tmp_path, batch_size=batch_size))
    return module, spy


class Dense(pl.Callback):
    """Differentiates each term by itself, on whole logits, before the first step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx:
            return
        assert isinstance(pl_module, DistillModule)
        student, teacher = pl_module.forward_both(batch)
        assert teacher is not None
        valid, n = batch["labels"] != -100, (batch["labels"] != -100).sum()
        s, t = (side.head(side.features[valid]) for side in (student, teacher))
        p = (t / 2).softmax(-1)
        points = {"ce": [student.features], "kd": [student.features]}
        points |= {"hidden": [student.taps[INPUT], student.taps[LAYER]], "last": [student.taps[LAYER]]}
        value = {
            "ce": torch.nn.functional.cross_entropy(s, batch["labels"][valid]),
            "kd": 4 * (p * (p.log() - (s / 2).log_softmax(-1))).sum() / n,
            "hidden": sum(point[valid].pow(2).mean(-1).mean() for point in points["hidden"]),
            "last": points["last"][0][valid].pow(2).mean(-1).mean(),
        }
        parameters = list(student_of(pl_module).parameters())
        # at a tap the gradient is that of the term through this use of it alone, so the graph is cut above each tap
        self.norms = {}
        for name, at in points.items():
            if name in ("ce", "kd"):
                (gradient,) = torch.autograd.grad(value[name], at, retain_graph=True)
                self.norms[name] = gradient.norm().item()
            else:
                leaves = [point.detach().requires_grad_() for point in at]
                total = sum(leaf[valid].pow(2).mean(-1).mean() for leaf in leaves)
                gradients = torch.autograd.grad(total, leaves)
                self.norms[name] = torch.cat([g.flatten() for g in gradients]).norm().item()
        flat = {}
        for name, v in value.items():
            gradients = torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True)
            flat[name] = torch.cat([g.flatten() for g in gradients]).double()
        every = torch.stack(list(flat.values()))
        self.gram = every @ every.T


def student_of(module: DistillModule) -> torch.nn.Module:
    assert module.student is not None
    return module.student


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_norms_and_exact_norms_equal_autograd_of_each_term(tmp_path: Path, checkpointing: bool) -> None:
    dense = Dense()
    _, spy = fit(tmp_path, checkpointing=checkpointing, callbacks=[dense])
    assert list(spy.seen[0].norms) == ["ce", "kd", "hidden", "last"]
    assert spy.seen[0].norms == pytest.approx(dense.norms, rel=1e-5)
    assert spy.seen[0].gram is not None
    torch.testing.assert_close(spy.seen[0].gram, dense.gram, rtol=1e-4, atol=1e-9)
    assert [measured.gram is not None for measured in spy.seen] == [True, False, True]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 8), (4, 2)])
def test_accumulation_measures_what_the_whole_batch_does(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    _, whole = fit(tmp_path)
    _, parts = fit(tmp_path, batch_size, accumulate_grad_batches=accumulate)
    for a, b in zip(whole.seen, parts.seen, strict=True):
        assert b.losses == pytest.approx(a.losses, rel=1e-4)
        assert b.norms == pytest.approx(a.norms, rel=1e-4)
        assert (a.gram is None) == (b.gram is None)
        assert a.gram is None or torch.allclose(a.gram, b.gram, rtol=1e-3, atol=1e-7)


def measured(tmp_path: Path) -> list[Measured]:
    """What a rank's balancer is told."""
    return fit(tmp_path, 2, accumulate_grad_batches=2, strategy="ddp", devices=2)[1].seen


def test_two_ranks_measure_what_one_does_and_know_the_same(tmp_path: Path) -> None:
    _, one = fit(tmp_path)
    ranks = run_ranks(measured, 2, tmp_path)
    for a, b, c in zip(one.seen, *ranks, strict=True):
        assert b.losses == c.losses
        assert b.norms == c.norms
        assert (b.gram is None) == (c.gram is None)
        assert b.gram is None or torch.equal(b.gram, c.gram)
        assert b.norms == pytest.approx(a.norms, rel=1e-4)
        assert a.gram is None or torch.allclose(a.gram, b.gram, rtol=1e-3, atol=1e-7)


def test_bfloat16_measures_about_the_same(tmp_path: Path) -> None:
    _, full = fit(tmp_path, max_steps=1)
    _, half = fit(tmp_path, max_steps=1, precision="bf16-mixed")
    assert half.seen[0].norms == pytest.approx(full.seen[0].norms, rel=3e-2)


def test_measuring_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for every in (0, 1):
        seen = pair.Gradients()

        class Quiet(Spy):
            exact_every = every

            def wants_norms(self, step: int) -> bool:
                return self.exact_every == 1

        pl.seed_everything(0, verbose=False)
        module = pair.module(tmp_path, losses=terms(), balancer=Quiet())
        pair.trainer(max_steps=3, callbacks=[seen], log_every_n_steps=0).fit(module, pair.data(tmp_path, batch_size=8))
        gradients.append(seen.steps)
        assert bool(module.balancer.seen[0].norms) == bool(every)
    for a, b in zip(*gradients, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-7)


def test_a_term_that_weighs_nothing_has_no_norm_at_its_tap(tmp_path: Path) -> None:
    _, spy = fit(tmp_path, max_steps=1, hidden=0.0)
    assert spy.seen[0].norms["hidden"] == 0.0
    assert spy.seen[0].norms["last"] > 0


@pytest.mark.parametrize("log_every", [0, 1])
def test_what_is_measured_for_the_log_does_not_reach_the_balancer(tmp_path: Path, log_every: int) -> None:
    class Rare(Spy):
        exact_every = 0

        def wants_norms(self, step: int) -> bool:
            return step == 1

    pl.seed_everything(0, verbose=False)
    module = pair.module(tmp_path, losses=terms(), balancer=Rare())
    pair.trainer(max_steps=3, log_every_n_steps=log_every).fit(module, pair.data(tmp_path, batch_size=8))
    assert [bool(measured.norms) for measured in module.balancer.seen] == [False, True, False]


def test_no_tap_outlives_its_step(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(Size):
        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            alive.extend(weakref.ref(tap) for tap in student.taps.values())
            return super().forward(student, teacher, batch)

    pl.seed_everything(0, verbose=False)
    losses = {"ce": CrossEntropy(), "hidden": Watched(INPUT, LAYER)}
    module = pair.module(tmp_path, losses=losses, balancer=Spy())
    gc.disable()
    try:
        pair.trainer(max_steps=4).fit(module, pair.data(tmp_path, batch_size=8))
        assert len(alive) >= 8
        assert sum(ref() is not None for ref in alive) <= 2, "taps of earlier steps are still held"
    finally:
        gc.enable()


def test_every_figure_of_a_term_is_logged(tmp_path: Path) -> None:
    logged: dict[str, float] = {}

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            logged.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    fit(tmp_path, max_steps=3, callbacks=[Log()], logger=JsonlLogger(tmp_path), log_every_n_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/ce_grad_norm_exact" in line] == [0, 2], "only where it was measured"
    for name, weight in {"ce": 0.5, "kd": 0.5, "hidden": 3.0, "last": 0.5}.items():
        assert logged[f"train/{name}_weight"] == weight
        assert logged[f"train/{name}_weighted"] == pytest.approx(weight * logged[f"train/{name}"])
        assert logged[f"train/{name}_grad_norm"] > 0
    assert logged["train/loss"] == pytest.approx(sum(logged[f"train/{name}_weighted"] for name in terms()))
