"""What is saved at the end: whole, from any strategy, without what belongs to the terms."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.callbacks.qat import QuantizationAwareTraining
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.report import student
from distill.types import TrainingError
from tests import pair
from tests.ranks import run_ranks


def test_projectors_are_beside_the_student_and_not_in_it(tmp_path: Path) -> None:
    module = pair.module(tmp_path, losses={"kd": ForwardKL(), "hidden": HiddenMSE("last")}, balancer=None)
    trainer = pair.trainer(max_steps=1)
    trainer.fit(module, pair.data(tmp_path, batch_size=2))
    student.save(trainer, module, tmp_path)
    saved = load_file(tmp_path / "losses.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {"hidden.projectors.0.weight": torch.Size([24, 16])}
    torch.testing.assert_close(saved["hidden.projectors.0.weight"], module.state_dict()["losses.hidden.projectors.0.weight"])
    assert not any("projector" in name for name in load_file(tmp_path / "student" / "model.safetensors"))


def test_terms_that_learned_nothing_leave_no_file(tmp_path: Path) -> None:
    data, module, trainer = pair.data(tmp_path, batch_size=2), pair.module(tmp_path), pair.trainer(max_steps=1)
    trainer.fit(module, data)
    student.save(trainer, module, tmp_path)
    assert not (tmp_path / "losses.safetensors").exists()


def _train_and_save(folder: str, strategy: str) -> None:
    path = Path(folder)
    module = pair.module(path, losses={"kd": ForwardKL(), "hidden": HiddenMSE("last")}, balancer=None)
    trainer = pair.trainer(max_steps=3, strategy=strategy, devices=int(os.environ["WORLD_SIZE"]))
    trainer.fit(module, pair.data(path, batch_size=4 // int(os.environ["WORLD_SIZE"])))
    student.save(trainer, module, path / strategy)


@pytest.mark.slow
def test_every_strategy_leaves_the_same_student(tmp_path: Path) -> None:
    pair.data(tmp_path)
    run_ranks(_train_and_save, 1, str(tmp_path), "auto")
    expected: dict[str, Any] = load_file(tmp_path / "auto" / "student" / "model.safetensors")
    for strategy in ("zero3", "fsdp2"):
        run_ranks(_train_and_save, 2, str(tmp_path), strategy)
        saved = load_file(tmp_path / strategy / "student" / "model.safetensors")
        torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-5)
        projectors = [load_file(tmp_path / name / "losses.safetensors") for name in (strategy, "auto")]
        torch.testing.assert_close(*projectors, rtol=1e-4, atol=1e-5)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / strategy / "student").dtype == torch.float32


def test_a_student_that_compressions_have_not_let_go_is_not_saved(tmp_path: Path) -> None:
    """Stock transformers would load random weights for what is parametrised."""

    class Forgets(QuantizationAwareTraining):
        def finish(self, student: PreTrainedModel) -> PreTrainedModel:
            return student

    module = pair.module(tmp_path)
    trainer = pair.trainer(max_steps=1, callbacks=[Forgets("int8")])
    trainer.fit(module, pair.data(tmp_path, batch_size=2))
    with pytest.raises(
        TrainingError, match=r"14 modules that.*e\.g\. 'model\.layers\.0\.self_attn\.q_proj\.[a-z_]+'.*checkpoint is safe.*consolidate"
    ):
        student.save(trainer, module, tmp_path / "run")
    assert not (tmp_path / "run").exists()
