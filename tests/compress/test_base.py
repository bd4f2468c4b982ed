"""A compression under every strategy: a stand-in whose parametrization has a parameter and a buffer of its own."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.compress.base import Compression
from distill.report import student
from distill.students.load import FromConfig
from distill.students.lora import LoRA
from distill.tasks import Task
from distill.types import ConfigError
from tests import pair
from tests.parallel import runs
from tests.ranks import run_ranks

PLACE = "model.layers.0.mlp.down_proj"


class Gain(nn.Module):
    """`weight · gain · keep`, the gain trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((weight.shape[0], 1), 0.5))
        keep = torch.ones(1, weight.shape[1])
        keep[0, 3] = 0
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain * self.keep


class Halved(Compression):
    def prepare(self, student: PreTrainedModel, task: Task) -> None:
        linear = student.get_submodule(PLACE)
        assert isinstance(linear, nn.Linear)
        parametrize.register_parametrization(linear, "weight", Gain(linear.weight), unsafe=True)

    def finish(self, student: PreTrainedModel) -> PreTrainedModel:
        parametrize.remove_parametrizations(student.get_submodule(PLACE), "weight", leave_parametrized=True)
        return student

    def summary(self) -> list[str]:
        return [PLACE]


def train(folder: str, strategy: str) -> Tensor:
    path, ranks = Path(folder), int(os.environ["WORLD_SIZE"])
    module = pair.module(path)
    trainer = pair.trainer(max_steps=3, strategy=strategy, devices=ranks, callbacks=[Halved()])
    trainer.fit(module, pair.data(path, batch_size=4 // ranks))
    assert not parametrize.is_parametrized(runs.teacher_of(module).get_submodule(PLACE))
    saved = student.save(trainer, module, path / strategy)
    assert trainer.global_rank > 0 or saved["parameters"] == module.size["parameters"]
    assert module.student is not None
    batch = next(iter(module.data.val_dataloader()))
    if strategy != "auto":
        return torch.empty(0)
    assert parametrize.is_parametrized(module.student.get_submodule(PLACE)), "the student goes on as it is trained"
    return module.student.eval()(input_ids=batch["input_ids"]).logits.detach()


@pytest.mark.slow
def test_every_strategy_trains_and_saves_the_same(tmp_path: Path) -> None:
    pair.data(tmp_path)
    (logits,) = run_ranks(train, 1, str(tmp_path), "auto")
    expected = load_file(tmp_path / "auto" / "student" / "model.safetensors")
    assert expected[f"{PLACE}.weight"][:, 3].abs().max() == 0
    assert not any("parametrizations" in name for name in expected)
    data = pair.data(tmp_path, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "auto" / "student")
    torch.testing.assert_close(reloaded(input_ids=batch["input_ids"]).logits, logits)
    for strategy in ("ddp", "zero2", "zero3"):
        run_ranks(train, 2, str(tmp_path), strategy)
        torch.testing.assert_close(load_file(tmp_path / strategy / "student" / "model.safetensors"), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_student_is_refused(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=4)
    base = FromConfig(pair.STUDENT)
    lora = LoRA.__new__(LoRA)
    lora.base, lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.name = base, 2, 4, 0.0, "all-linear", "x"
    with pytest.raises(ConfigError, match="Halved compresses weights that LoRA leaves frozen"):
        pair.trainer(max_steps=1, callbacks=[Halved()]).fit(pair.module(tmp_path, student=lora), data)
