"""Layers by name."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from distill.compress.select import linears
from distill.types import ConfigError
from tests import models

KEY = "trainer.callbacks: Pruning"
PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def test_all_but_the_head_of_a_language_model() -> None:
    model = models.causal_lm()
    assert list(linears(model, None, None, KEY)) == [f"model.layers.{i}.{part}" for i in range(2) for part in PARTS]


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", {"classifier"}), ("roberta", {"classifier.dense"}), ("distilbert", {"pre_classifier", "classifier"})]
)
def test_all_but_the_head_of_a_classifier(kind: str, head: set[str]) -> None:
    model = models.classifier(kind)
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = set(linears(model, None, None, KEY))
    assert head <= every - chosen
    assert all(name.startswith(f"{kind}.") for name in chosen)
    assert len(chosen) >= 12


def test_a_model_without_a_head_is_all_trunk() -> None:
    model = AutoModel.from_config(AutoConfig.for_model("bert", **models.CONFIGS["bert"]))
    assert "encoder.layer.0.attention.self.query" in linears(model, None, None, KEY)


def test_patterns_choose_and_leave_out() -> None:
    model = models.causal_lm()
    assert list(linears(model, ["*.mlp.*"], ["*down_proj", "model.layers.0.*"], KEY)) == [f"model.layers.1.{part}" for part in PARTS[4:6]]
    assert linears(model, ["*.0.*q_proj"], None, KEY)["model.layers.0.self_attn.q_proj"] is model.get_submodule(
        "model.layers.0.self_attn.q_proj"
    )


def test_a_head_is_chosen_by_its_name() -> None:
    assert list(linears(models.causal_lm(), ["lm_head"], None, KEY)) == ["lm_head"]


def test_parametrised_layers_are_the_same_layers() -> None:
    model = models.causal_lm()
    before = list(linears(model, None, None, KEY))
    for module in linears(model, ["*q_proj"], None, KEY).values():
        parametrize.register_parametrization(module, "weight", nn.Tanh(), unsafe=True)
    assert list(linears(model, None, None, KEY)) == before


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_told_near_names(option: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"Pruning\.{option}: no linear layer is called '\*q_prj'\. Did you mean 'q_proj'.*model\.layers\.\*\.mlp"
    ):
        linears(models.causal_lm(), **({"include": None, "exclude": None} | {option: ["*q_prj"]}), key=KEY)  # type: ignore[arg-type]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer to compress: include leaves out its head, exclude is \['\*'\]"):
        linears(models.causal_lm(), None, ["*"], KEY)
    with pytest.raises(ConfigError, match=r"its layers are of other classes|include leaves out its head"):
        linears(models.causal_lm("gpt2"), None, None, KEY)


def test_a_tied_weight_is_refused() -> None:
    model = models.causal_lm(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(ConfigError, match=r"the weight of 'lm_head' is shared.*exclude 'lm_head'"):
        linears(model, ["*"], None, KEY)
    assert "lm_head" not in linears(model, ["*"], ["lm_head"], KEY)
    assert torch.is_tensor(next(iter(linears(model, None, None, KEY).values())).weight)


def mixture(experts: int) -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_local_experts=experts
    )
    return MixtralForCausalLM(config)


def test_fused_experts_are_not_left_out_in_silence() -> None:
    """An expert has 3 · 16 · 24 weights; the layer's attention and router have far fewer than four of them."""
    with pytest.raises(ConfigError, match=r"Pruning: 4,608 parameters, e\.g\. 'layers\.0\.mlp\.experts\.[a-z_]+', are fused over experts"):
        linears(mixture(4), None, None, KEY)
    assert len(linears(mixture(4), ["*self_attn*"], None, KEY)) == 4, "asked for by name"
    few = AutoModelForCausalLM.from_config(MixtralConfig(**mixture(1).config.to_dict() | {"intermediate_size": 4}))
    with pytest.warns(UserWarning, match="192 parameters.*they stay as they are"):
        linears(few, None, None, KEY)
