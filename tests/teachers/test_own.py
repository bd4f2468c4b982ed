"""The student without its adapters, as its own teacher."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from distill.module import DistillModule
from distill.students.load import Pretrained
from distill.students.lora import LoRA
from distill.tasks import CausalLM, SequenceClassification
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from distill.types import ConfigError
from tests import pair
from tests.models import causal_lm, classifier, save, tokens
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LINEARS = ["q_proj", "v_proj", "down_proj"]


def adapted(targets: list[str] = LINEARS, **more: Any) -> PeftModel:
    """A model with adapters that have learned something, dropout, in training mode."""
    model = get_peft_model(causal_lm(attention_dropout=0.3), LoraConfig(r=2, lora_dropout=0.5, target_modules=targets, **more))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    return model.train()


def beside(student: PeftModel) -> SelfTeacher:
    teacher = SelfTeacher()
    teacher.setup(CausalLM(), CPU, torch.float32)
    teacher.beside(student)
    return teacher


def test_is_the_base_to_the_bit(tmp_path: Path) -> None:
    online = OnlineTeacher(save(causal_lm(), tmp_path))
    online.setup(CausalLM(), CPU, torch.float32)
    own = beside(adapted())
    batch = {"input_ids": tokens()}
    theirs, ours = (teacher(batch, ["model.layers.0"]) for teacher in (online, own))
    assert torch.equal(theirs.features, ours.features)
    assert torch.equal(theirs.head(theirs.features), ours.head(ours.features))
    assert torch.equal(theirs.taps["model.layers.0"], ours.taps["model.layers.0"])
    assert not ours.features.requires_grad
    student = CausalLM().outputs(adapted().eval(), batch).features
    assert (student - ours.features).abs().max() > 0.1  # the adapters do something


def test_leaves_every_flag_and_the_random_numbers_as_they_were() -> None:
    student = adapted()
    student.base_model.model.model.layers[0].eval()
    next(p for n, p in student.named_parameters() if "lora_A" in n).requires_grad_(False)
    flags = lambda: ([m.training for m in student.modules()], [p.requires_grad for p in student.parameters()])
    before, state = flags(), torch.get_rng_state()
    teacher = beside(student)
    teacher({"input_ids": tokens()})
    assert flags() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert student.get_model_status().enabled is True
    with pytest.raises(ConfigError, match="nothing"):
        teacher({"input_ids": tokens()}, ["nothing"])
    assert flags() == before


def test_holds_no_model_of_its_own() -> None:
    teacher = beside(adapted())
    assert teacher.models() == []
    assert teacher.describe()["parameters"] == 0
    teacher.assert_frozen()


def test_the_gradient_of_a_step_is_not_touched() -> None:
    """Between the student's forward and its backward pass the teacher runs."""
    gradients: list[dict[str, Tensor]] = []
    for ask in (False, True):
        torch.manual_seed(0)
        student = adapted()
        teacher = beside(student)
        torch.manual_seed(1)
        out = CausalLM().outputs(student, {"input_ids": tokens()})
        if ask:
            teacher({"input_ids": tokens()})
        out.head(out.features).square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_students_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.student has none; take LoRA, or an OnlineTeacher"):
        SelfTeacher().beside(causal_lm())
    with pytest.raises(ConfigError, match="needs a head without adapters"):
        beside(adapted(["q_proj", "lm_head"]))
    moving = adapted()
    moving.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"training changes .*norm\.weight there, too"):
        beside(moving)


def test_a_base_that_becomes_trainable_is_noticed() -> None:
    student = adapted()
    teacher = beside(student)
    student.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(AssertionError, match="trainable"):
        teacher.assert_frozen()


def test_a_classifier_keeps_the_head_it_came_with() -> None:
    base = classifier()
    student = get_peft_model(classifier(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.ones_like(weight), alpha=0.1 if "lora" in name else 1.0)
    teacher = SelfTeacher()
    teacher.setup(SequenceClassification(), CPU, torch.float32)
    teacher.beside(student)
    batch = {"input_ids": tokens()}
    assert torch.equal(teacher(batch).features[:, 0], base(**batch).logits)


def _module(path: Path, teacher: Any) -> DistillModule:
    return pair.module(path, teacher=teacher, student=LoRA(Pretrained(str(path / "teacher")), r=2, dropout=0.5))


def _weights(module: DistillModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_training_with_it_is_training_with_the_base_and_resumes_to_the_bit(tmp_path: Path) -> None:
    pair.data(tmp_path)

    def fit(teacher: Any, until: int, resume: Path | None = None, keep: Path | None = None) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = _module(tmp_path, teacher)
        trainer = pair.trainer(max_steps=until)
        trainer.fit(module, pair.data(tmp_path, batch_size=4), ckpt_path=resume, weights_only=False)
        if keep is not None:
            trainer.save_checkpoint(keep)
        return _weights(module)

    online = fit(OnlineTeacher(str(tmp_path / "teacher")), 4)
    whole = fit(SelfTeacher(), 4)
    fit(SelfTeacher(), 2, keep=tmp_path / "half.ckpt")
    resumed = fit(SelfTeacher(), 4, resume=tmp_path / "half.ckpt")
    assert len(whole) > 0
    for name, weight in whole.items():
        assert torch.equal(weight, online[name])
        assert torch.equal(weight, resumed[name])


def _on_ranks(folder: str) -> list[dict[str, Tensor]]:
    path, found = Path(folder), []
    for teacher in (SelfTeacher(), OnlineTeacher(str(path / "teacher"))):
        pl.seed_everything(5, verbose=False)
        module = _module(path, teacher)
        pair.trainer(max_steps=2, devices=2, strategy="ddp").fit(module, pair.data(path, batch_size=2))
        found.append(_weights(module))
    return found


@pytest.mark.slow
def test_under_ddp_it_is_the_base_too(tmp_path: Path) -> None:
    pair.data(tmp_path)
    ranks = run_ranks(_on_ranks, 2, str(tmp_path))
    for ours, _ in ranks:
        assert all(torch.equal(ours[name], weight) for name, weight in ranks[0][1].items())
