"""Counting without weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from distill.plan import models
from distill.students.load import FromConfig, Pretrained
from distill.students.lora import LoRA
from distill.students.low_rank import LowRank
from distill.students.shrink import Shrunk
from distill.tasks import CausalLM, SequenceClassification
from distill.types import ConfigError
from tests import models as small
from tests.plan.jobs import LLAMA_1B, LLAMA_8B, shape


def test_llama_has_the_parameters_that_its_model_card_says() -> None:
    # huggingface.co/meta-llama: 8.03B and 1.24B
    assert shape(LLAMA_8B).parameters == 8_030_261_248
    assert shape(LLAMA_1B).parameters == 1_235_814_400


def test_the_sizes_of_a_llama_are_those_of_its_config() -> None:
    found = shape(LLAMA_8B)
    assert (found.width, found.layers, found.heads, found.inner, found.gated) == (4096, 32, 32, 14336, True)
    assert (found.queries, found.keys) == (4096, 2 * 8 * 128)
    assert found.head == found.embedding == 4096 * 128256
    assert not found.tied
    assert found.layer == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert shape(LLAMA_1B).tied


@pytest.mark.parametrize("kind", sorted(small.CONFIGS))
def test_a_model_without_weights_counts_as_one_with(kind: str) -> None:
    real = small.classifier(kind) if "bert" in kind else small.causal_lm(kind)
    task = SequenceClassification() if "bert" in kind else CausalLM()
    found = models.shape_of(models.on_meta(task, real.config, None, FromConfig({})), "model.student")
    assert found.parameters == found.trainable == sum(p.numel() for p in real.parameters())
    assert found.layers == 2


def test_lora_trains_its_adapters_alone() -> None:
    config = AutoConfig.for_model("llama", **small.CONFIGS["llama"])
    student = LoRA(Pretrained("x"), r=2, target_modules=["q_proj"])
    found = models.shape_of(models.on_meta(CausalLM(), config, None, student), "model.student")
    assert found.trainable == 2 * 2 * (16 + 16)  # two layers, r (in + out)
    assert not found.head_trains


def test_a_student_that_will_be_cut_counts_as_the_one_that_is_cut(tmp_path: Path) -> None:
    folder = small.save(small.causal_lm(num_hidden_layers=4), tmp_path)
    recipe = LoRA(Shrunk(folder, layers=3, intermediate_size=16, importance="weights"), r=2, target_modules=["q_proj"])
    found = models.shape_of(
        models.on_meta(CausalLM(), recipe.blueprint(CausalLM(), {"vocab_size": small.VOCAB}), None, recipe), "model.student"
    )
    cut = models.shape_of(recipe.build(CausalLM(), {"vocab_size": small.VOCAB}, small.tokenizer(), torch.float32), "model.student")
    assert found == cut
    assert found.layers == 3


def test_a_student_that_depends_on_its_weights_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="what LowRank makes is known only when the weights are; use fit --dry-run"):
        LowRank(Pretrained("x"), rank=2).blueprint(CausalLM(), {})
