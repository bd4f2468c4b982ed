"""The module: what is trained, by what gradient, and what the teacher never is part of."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from distill.balance.fixed import FixedWeights
from distill.balance.gradnorm import GradNorm
from distill.callbacks.pruning import Pruning
from distill.compress.integers import record, recorded
from distill.compress.schemes import SCHEMES
from distill.losses.base import Loss, TokenLoss
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy, ZLoss
from distill.losses.support import Distribution
from distill.schedule import Linear
from distill.students.load import FromConfig, Pretrained
from distill.types import Batch, ConfigError, Outputs, TrainingError
from tests import pair
from tests.ranks import run_ranks


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def fit(tmp_path: Path, module: Any = None, data: dict[str, Any] | None = None, **kwargs: Any) -> tuple[Any, pair.Gradients]:
    pl.seed_everything(0, verbose=False)
    rows = pair.data(tmp_path, **(data or {"batch_size": 8}))
    module = pair.module(tmp_path) if module is None else module
    seen = pair.Gradients()
    callbacks = [seen, *kwargs.pop("callbacks", [])]
    pair.trainer(callbacks=callbacks, **({"max_steps": 3} | kwargs)).fit(module, rows)
    return module, seen


def test_first_gradient_is_that_of_the_dense_formula_over_the_global_batch(tmp_path: Path) -> None:
    keep: list[Batch] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
            keep.append(batch)
            if batch_idx == 0:
                self.initial = {k: v.clone() for k, v in pl_module.student.state_dict().items()}

    watch = Keep()
    module, seen = fit(tmp_path, max_steps=1, callbacks=[watch])
    student = module.student.double()
    student.load_state_dict(watch.initial)
    student.zero_grad()
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float64)
    batch = keep[0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    valid = batch["labels"] != -100
    z_s, z_t, y = student(**inputs).logits[valid], teacher(**inputs).logits[valid].detach(), batch["labels"][valid]
    p_t = (z_t / 2).softmax(-1)
    kl = (p_t * (p_t.log() - (z_s / 2).log_softmax(-1))).sum(-1)
    (0.3 * F.cross_entropy(z_s, y) + 0.7 * 4 * kl.mean()).backward()
    assert 0 < len(y) < batch["labels"].numel() / 2, "the rows must have padding and prompts for this test to mean something"
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(seen.steps[0][f"student.{name}"].double(), parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 8), (4, 2)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    _, whole = fit(tmp_path)
    _, parts = fit(tmp_path, data={"batch_size": batch_size}, accumulate_grad_batches=accumulate)
    assert len(whole.steps) == len(parts.steps) == 3
    for a, b in zip(whole.steps, parts.steps, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


def gradients(tmp_path: Path, make: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
    """What a rank trains by."""
    return fit(tmp_path, make(tmp_path), **kwargs)[1].steps


TWO_RANKS: dict[str, Any] = {"data": {"batch_size": 2}, "accumulate_grad_batches": 2, "strategy": "ddp", "devices": 2}


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    _, one = fit(tmp_path)
    for two in run_ranks(partial(gradients, **TWO_RANKS), 2, tmp_path, pair.module):
        assert len(two) == 3
        for a, b in zip(one.steps, two, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


def test_the_teacher_is_invisible_and_never_changes(tmp_path: Path) -> None:
    module = pair.module(tmp_path)
    trainer = pair.trainer(max_steps=3)
    data = pair.data(tmp_path, batch_size=8)
    before = weights_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher"))
    trainer.fit(module, data)
    teacher = module.teacher.model
    assert weights_hash(teacher) == before
    held = {id(p) for p in teacher.parameters()}
    assert not held & {id(p) for p in module.parameters()}
    assert not held & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any("teacher" in name for name in module.state_dict())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"student"}
    module.train()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_teacher_that_became_trainable_stops_the_fit(tmp_path: Path) -> None:
    module = pair.module(tmp_path)

    class Thaw(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.teacher.model.train()

    with pytest.raises(AssertionError, match="training mode"):
        fit(tmp_path, module, callbacks=[Thaw()])


def test_the_student_learns_the_teacher(tmp_path: Path) -> None:
    module = pair.module(tmp_path, losses={"kd": ForwardKL()}, balancer=None)
    logged: list[float] = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            logged.append(float(trainer.callback_metrics["train/kd"]))

    fit(tmp_path, module, max_steps=60, callbacks=[Log()])
    assert logged[-1] < 0.5 * logged[0]


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_term_and_rows(tmp_path: Path) -> None:
    class Bad(TokenLoss):
        calls = 0

        def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
            Bad.calls += 1
            return student.logp()[:, 0] * (float("nan") if Bad.calls == 2 else 1.0)

    module = pair.module(tmp_path, losses={"ce": CrossEntropy(), "bad": Bad()}, balancer=None, max_skipped_steps=0)
    after: list[str] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            after.append(weights_hash(pl_module.student))

    with pytest.raises(TrainingError, match=r"step 1: loss is nan, bad is nan.*Training rows of this batch: \[\d+"):
        fit(tmp_path, module, callbacks=[Watch()])
    assert after == [weights_hash(module.student)]


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    class Flat(TokenLoss):
        """Its value is 0, its gradient 0 · ∞."""

        def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
            return student.logp().mul(0).sum(-1).abs().sqrt()

    module = pair.module(tmp_path, losses={"ce": CrossEntropy(), "flat": Flat()}, balancer=None, max_skipped_steps=0)
    initial: list[str] = []

    class Keep(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            initial.append(weights_hash(pl_module.student))

    with pytest.raises(TrainingError, match="step 0: grad_norm is nan"):
        fit(tmp_path, module, callbacks=[Keep()])
    assert initial == [weights_hash(module.student)]


@pytest.mark.parametrize("wrong", [lambda x: x.sum(-1).mean(), lambda x: x, lambda x: x.sum(-1, keepdim=True)])
def test_a_loss_that_is_not_one_value_per_position_is_refused(tmp_path: Path, wrong: Any) -> None:
    class Wrong(TokenLoss):
        def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
            return wrong(student.logp())

    with pytest.raises(ConfigError, match=r"model.losses.wrong gives shape .* it must give one value per position"):
        fit(tmp_path, pair.module(tmp_path, losses={"wrong": Wrong()}, balancer=None))


def test_a_term_without_a_teacher_may_use_taps(tmp_path: Path) -> None:
    class Small(Loss):
        needs_teacher = False
        student_taps = ("model.layers.0",)

        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
            assert teacher is None
            return student.taps["model.layers.0"][batch["labels"] != -100].pow(2).mean(-1).sum()

    module = pair.module(tmp_path, teacher=None, losses={"ce": CrossEntropy(), "small": Small()}, balancer=None)
    _, seen = fit(tmp_path, module, max_steps=1)
    assert len(seen.steps) == 1


def test_a_term_on_taps_joins_the_objective(tmp_path: Path) -> None:
    class Last(Loss):
        student_taps = ("model.layers.0",)
        teacher_taps = ("model.layers.1", "model.layers.0")

        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            assert not teacher.taps["model.layers.1"].requires_grad
            valid = batch["labels"] != -100
            ours = student.taps["model.layers.0"][valid]
            return (ours - teacher.taps["model.layers.1"][valid][:, : ours.shape[-1]]).pow(2).mean(-1).sum()

    _, seen = fit(tmp_path, pair.module(tmp_path, losses={"hidden": Last()}, balancer=FixedWeights({"hidden": 2.0})), max_steps=1)
    assert seen.steps[0]["student.model.layers.0.mlp.up_proj.weight"].abs().sum() > 0
    _, other = fit(tmp_path, pair.module(tmp_path, losses={"hidden": Last()}, balancer=None), max_steps=1)
    name = "student.model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(seen.steps[0][name], 2 * other.steps[0][name])


def test_a_scheduled_temperature_moves_and_is_logged(tmp_path: Path) -> None:
    seen: list[float] = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(float(trainer.callback_metrics["train/kd_temperature"]))

    fit(tmp_path, pair.module(tmp_path, losses={"kd": ForwardKL(Linear(4.0, 1.0))}, balancer=None), callbacks=[Log()], log_every_n_steps=1)
    assert seen == pytest.approx([4.0, 3.0, 2.0])


def test_losses_that_need_a_teacher_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['kd'\] need a teacher"):
        pair.module(tmp_path, teacher=None)
    with pytest.raises(ConfigError, match="empty"):
        pair.module(tmp_path, losses={}, balancer=None)
    with pytest.raises(ConfigError, match=r"weights for \['kl'\], but model.losses has \['ce', 'kd'\]"):
        pair.module(tmp_path, balancer=FixedWeights({"kl": 1.0}))


def test_forgetting_the_teacher_leaves_the_same_student(tmp_path: Path) -> None:
    with_teacher = pair.module(tmp_path)
    alone = pair.module(tmp_path)
    alone.forget_teacher()
    assert list(alone.terms) == ["ce"]
    assert alone.balancer.weights(list(alone.terms)) == {"ce": 1.0}
    initial = []

    class Keep(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            initial.append(weights_hash(pl_module.student))

    fit(tmp_path, with_teacher, callbacks=[Keep()])
    torch.rand(100)
    fit(tmp_path, alone, callbacks=[Keep()])
    assert initial[0] == initial[1]
    assert weights_hash(with_teacher.student) != weights_hash(alone.student)


def balanced(tmp_path: Path, **kwargs: Any) -> Any:
    """Three terms, one with projectors, weighed anew in every step."""
    losses = {"ce": CrossEntropy(), "kd": ForwardKL(2.0), "hidden": HiddenMSE(projector="mlp")}
    return pair.module(tmp_path, losses=losses, balancer=GradNorm(every=1, exact_every=2, alpha=0.5), **kwargs)


def test_forgetting_the_teacher_keeps_the_ratios_of_the_hard_terms(tmp_path: Path) -> None:
    losses = {"ce": CrossEntropy(), "kd": ForwardKL(), "z": ZLoss()}
    module = pair.module(tmp_path, losses=losses, balancer=FixedWeights({"ce": 0.2, "kd": 0.8, "z": 1e-4}))
    module.forget_teacher()
    assert module.balancer.weights(list(module.terms)) == {"ce": 1.0, "z": pytest.approx(5e-4)}


@pytest.mark.parametrize("weight", [1e-4, 0.0])
def test_no_student_is_trained_on_a_regulariser_alone(tmp_path: Path, weight: float) -> None:
    losses = {"kd": ForwardKL(), "z": ZLoss()}
    module = pair.module(tmp_path, losses=losses, balancer=FixedWeights({"z": weight}))
    module.forget_teacher()
    assert module.balancer.weights(list(module.terms)) == {"z": pytest.approx(weight), "ce": 1.0}
    silent = pair.module(tmp_path, balancer=FixedWeights({"ce": 0.0}))
    silent.forget_teacher()
    assert silent.balancer.weights(list(silent.terms))["cross_entropy"] == 1.0


def test_another_balancer_begins_anew_and_other_terms_are_refused(tmp_path: Path) -> None:
    first = pair.module(tmp_path)
    trainer = pair.trainer(max_steps=2)
    trainer.fit(first, pair.data(tmp_path, batch_size=8))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    data = pair.data(tmp_path, batch_size=8)
    again: dict[str, Any] = {"ckpt_path": tmp_path / "x.ckpt", "weights_only": False}
    pair.trainer(max_steps=3).fit(pair.module(tmp_path, balancer=GradNorm()), data, **again)
    with pytest.raises(ConfigError, match=r"do not have the same parameters in \['hidden'\]"):
        pair.trainer(max_steps=3).fit(balanced(tmp_path), pair.data(tmp_path, batch_size=8), **again)


def test_a_checkpoint_of_another_student_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer = pair.trainer(max_steps=2)
    data = pair.data(tmp_path, batch_size=8)
    trainer.fit(pair.module(tmp_path), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    pruned = pair.trainer(max_steps=3, callbacks=[Pruning(0.5)])
    with pytest.raises(ConfigError, match=r"it lacks .*mask.*Resume with the model, the losses and the callbacks"):
        pruned.fit(pair.module(tmp_path), data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)


def test_a_student_that_was_quantised_once_is_not_said_to_be(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    record(model, "int4", {"model.layers.0.mlp.up_proj": SCHEMES["int4"]})
    model.save_pretrained(tmp_path / "quantised")
    pair.tokenizer(tmp_path).save_pretrained(tmp_path / "quantised")
    module = pair.module(tmp_path, student=Pretrained(str(tmp_path / "quantised")))
    pair.trainer(max_steps=1).fit(module, data)
    assert recorded(module.student) == {}


def test_a_name_of_the_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['loss'\] are names of the log"):
        pair.module(tmp_path, losses={"loss": CrossEntropy()}, balancer=None)


@pytest.mark.parametrize(("dropout", "make"), [(0.0, pair.module), (0.3, pair.module), (0.3, balanced)])
def test_resume_in_mid_epoch_is_exact_to_the_bit(tmp_path: Path, dropout: float, make: Any) -> None:
    student = FromConfig(pair.STUDENT | {"attention_dropout": dropout})
    whole, _ = fit(tmp_path, make(tmp_path, student=student), max_steps=9)
    half = make(tmp_path, student=student)
    pl.seed_everything(0, verbose=False)
    trainer = pair.trainer(max_steps=9, enable_checkpointing=True, default_root_dir=tmp_path, callbacks=[_Stop(5)])
    trainer.fit(half, pair.data(tmp_path, batch_size=8))
    assert trainer.global_step == 5
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(tmp_path, student=student)
    torch.rand(7)  # a new process has another random state
    pair.trainer(max_steps=9).fit(resumed, pair.data(tmp_path, batch_size=8), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert weights_hash(resumed) == weights_hash(whole)
    names = list(whole.terms)
    assert resumed.balancer.weights(names) == whole.balancer.weights(names)


def test_three_balanced_terms_do_not_depend_on_how_the_batch_is_cut(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, balanced(tmp_path))

    _, accumulated = fit(tmp_path, balanced(tmp_path), data={"batch_size": 1}, accumulate_grad_batches=8)
    ranks = run_ranks(partial(gradients, **TWO_RANKS), 2, tmp_path, balanced)
    assert any("losses.hidden.projectors" in name for name in whole.steps[0])
    for steps in (accumulated.steps, *ranks):
        assert len(steps) == 3
        for a, b in zip(whole.steps, steps, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-6)


class _Stop(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_float16_weights_without_a_loss_scale_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16-true trains float16 weights without a loss scale"):
        fit(tmp_path, pair.module(tmp_path), precision="16-true")
