from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.callbacks.soft_movement import SoftMovementPruning
from distill.compress.mask import MovementMask, masks_of, parametrizations
from distill.report import student as report
from distill.students.load import FromConfig
from distill.types import ConfigError
from tests import models, pair
from tests.callbacks.test_pruning import GROUPED, fit, student_of


class Scores(pl.Callback):
    """Keeps the scores and their gradients just before the optimizer steps."""

    def __init__(self, pruning: SoftMovementPruning) -> None:
        self.pruning = pruning
        self.gradients: list[Tensor] = []
        self.scores: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        found = [mask for _, mask in masks_of(student_of(trainer), self.pruning.pruner.owner).values()]
        parameters = [mask.scores for mask in found if isinstance(mask, MovementMask)]
        self.scores.append(torch.cat([p.detach().clone() for p in parameters]))
        self.gradients.append(torch.cat([p.grad.clone() for p in parameters if p.grad is not None]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_added_once_a_step(accumulate: int, tmp_path: Path) -> None:
    """What comes on top of the gradient is that of λ_t · mean σ(rate · s), by autograd, whatever the accumulation."""
    soft = SoftMovementPruning(penalty=5.0, rate=20.0, begin=0.25, end=0.75, every=1)
    before, after = Scores(soft), Scores(soft)
    fit(tmp_path, before, soft, after, accumulate_grad_batches=accumulate)
    for step, (one, two, scores) in enumerate(zip(before.gradients, after.gradients, after.scores, strict=True)):
        progress = min(1.0, max(0.0, (step - 3) / 6))
        leaf = (20.0 * scores.double()).requires_grad_()
        (5.0 * (1 - (1 - progress) ** 3) * leaf.sigmoid().mean()).backward()
        assert leaf.grad is not None
        assert torch.allclose((two - one).double(), leaf.grad, atol=1e-7)
    assert len(after.scores) == 12
    assert (after.gradients[-1] - before.gradients[-1]).abs().max() > 1e-5


def test_training_finds_how_many_weights_stay_and_the_saved_student_computes_the_same(tmp_path: Path) -> None:
    soft = SoftMovementPruning(penalty=1.0, rate=30.0, begin=0.0, end=0.5, every=1, exclude=["*k_proj"])
    module = pair.module(tmp_path, student=FromConfig(GROUPED))
    trainer = fit(tmp_path, soft, module=module, max_steps=24)
    assert 0.05 < soft.figures()["sparsity"] < 0.95
    for name, (linear, mask) in masks_of(student_of(trainer), soft.pruner.owner).items():
        score = soft.pruner.score_of(student_of(trainer), name, "movement", 0, {})
        assert (mask.mask == (score.sigmoid() > 0.1)).float().mean() > 0.9, "as of the last step"
        assert parametrizations(linear).original.all()
    assert soft.summary()[0] == "σ(S) ≤ 0.1 by soft movement, λ to 1 from 0% to 50% of the steps"
    report.save(trainer, module, tmp_path / "run")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()
    ids = models.tokens(2, 7) % saved.config.vocab_size
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, student_of(trainer).eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"penalty": 0.0}, r"SoftMovementPruning\.penalty must be above 0; without it nothing is masked, got 0\.0"),
        ({"threshold": 0.5}, "all scores begin at"),
        ({"rate": 0.0}, "rate must be above 0"),
    ],
)
def test_bad_values_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SoftMovementPruning(**kwargs)


def test_scores_are_not_learned_in_half_precision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SoftMovementPruning adds up small steps.*precision=bf16-true rounds away; take bf16-mixed"):
        fit(tmp_path, SoftMovementPruning(), precision="bf16-true", max_steps=1)
