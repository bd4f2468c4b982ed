"""Steps that are not finite: unit tests of the count, and training on one and two ranks."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from distill.balance.fixed import FixedWeights
from distill.losses.base import TokenLoss
from distill.losses.hard import CrossEntropy
from distill.losses.support import Distribution
from distill.nonfinite import NonFinite
from distill.types import ConfigError, TrainingError
from tests import pair

NAN, INF = float("nan"), float("inf")


def test_counts_in_a_row_and_in_all() -> None:
    guard = NonFinite(2)
    seen = [guard.check(step, {"loss": value}, list) for step, value in enumerate([1.0, NAN, INF, 2.0, NAN, -INF])]
    assert seen == [False, True, True, False, True, True]
    assert guard.total == 4
    with pytest.raises(TrainingError, match=r"step 6: loss is nan for 3 steps in a row; .* Training rows of this batch: \[7, 8\]"):
        guard.check(6, {"loss": NAN, "kd": 1.0}, lambda: [7, 8])


def test_counts_go_on_after_a_resume() -> None:
    first, second = NonFinite(1), NonFinite(1)
    first.check(0, {"loss": NAN}, list)
    second.load_state_dict(first.state_dict())
    with pytest.raises(TrainingError, match="2 steps in a row"):
        second.check(1, {"loss": NAN}, list)


def test_negative_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_skipped_steps must be at least 0, got -1"):
        NonFinite(-1)


class Explodes(TokenLoss):
    """Its gradient, or its value, is not finite at some evaluations."""

    def __init__(self, at: set[int], value: bool) -> None:
        super().__init__()
        self.evaluations, self.when, self.value = 0, at, value

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        self.evaluations += 1
        zero = student.logp().sum(-1) * 0
        if self.evaluations - 1 not in self.when:
            return zero
        return zero + NAN if self.value else zero.abs().sqrt()


class Weights(pl.Callback):
    """The weights and the optimizer's moments after every step, as one vector each."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.moments: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))
        state = trainer.optimizers[0].state
        self.moments.append(torch.cat([s["exp_avg"].flatten().clone() for s in state.values()] or [torch.zeros(1)]))


@pytest.mark.parametrize("value", [True, False], ids=["loss", "gradient alone"])
def test_a_bad_step_leaves_weights_and_moments_as_they_were_and_training_goes_on(tmp_path: Path, value: bool) -> None:
    seen = Weights()
    data = pair.data(tmp_path, batch_size=2)
    losses = {"ce": CrossEntropy(), "bad": Explodes({2}, value)}
    module = pair.module(tmp_path, losses=losses, balancer=FixedWeights({"ce": 1.0, "bad": 1.0}))
    trainer = pair.trainer(max_steps=4, log_every_n_steps=1, callbacks=[seen])
    trainer.fit(module, data)
    assert torch.equal(seen.weights[2], seen.weights[1])
    assert torch.equal(seen.moments[2], seen.moments[1])
    assert not torch.equal(seen.weights[3], seen.weights[2])
    assert all(w.isfinite().all() for w in seen.weights)
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_one_bad_micro_batch_takes_the_whole_window_with_it(tmp_path: Path) -> None:
    seen = Weights()
    losses = {"ce": CrossEntropy(), "bad": Explodes({2}, value=True)}
    module = pair.module(tmp_path, losses=losses, balancer=FixedWeights({"ce": 1.0, "bad": 1.0}))
    trainer = pair.trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[seen])
    trainer.fit(module, pair.data(tmp_path, batch_size=2))
    steps = seen.weights[1::2]
    assert torch.equal(steps[1], steps[0])
    assert not torch.equal(steps[2], steps[1])


def test_the_rows_of_the_micro_batch_that_went_wrong_are_named(tmp_path: Path) -> None:
    ids: list[list[int]] = []

    class Ids(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            ids.append(batch["sample_ids"].tolist())

    losses = {"ce": CrossEntropy(), "bad": Explodes({1}, value=True)}
    module = pair.module(tmp_path, losses=losses, balancer=FixedWeights({"ce": 1.0, "bad": 1.0}), max_skipped_steps=0)
    with pytest.raises(TrainingError) as error:
        pair.trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[Ids()]).fit(module, pair.data(tmp_path, batch_size=2))
    assert f"Training rows of this batch: {ids[1]}" in str(error.value)
