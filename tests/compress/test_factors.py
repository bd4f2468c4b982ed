"""Layers of two factors: saved, loaded, refused by stock transformers, multiplied out again."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from distill.compress.factors import Factored, label, multiplied_out, put_factors, shapes
from distill.compress.integers import recorded
from distill.compress.ptq import ptq
from distill.export.grid import grids_of
from tests.models import causal_lm, classifier, save, tokens

RANKS = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.down_proj": 5}


def factored(**changes: object) -> PreTrainedModel:
    model = causal_lm(**changes)
    put_factors(model, RANKS)
    label(model)
    return model


def test_a_factored_layer_is_two_products() -> None:
    layer = Factored(4, 6, 2, bias=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), x @ layer.first.weight.T @ layer.second.weight.T + layer.second.bias)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (4 + 6) + 6


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back(tmp_path: Path, tied: bool) -> None:
    model = factored(tie_word_embeddings=tied)
    assert shapes(model) == RANKS
    model.save_pretrained(tmp_path / "a")
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert shapes(loaded) == RANKS
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    loaded.float().train()
    loaded(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in loaded.parameters()), "it can be cast and trained like any"
    loaded.eval().save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float64)
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert AutoConfig.from_pretrained(tmp_path / "b").quantization_config == {"quant_method": "low_rank", "ranks": RANKS}


def test_a_classifier_comes_back_too(tmp_path: Path) -> None:
    model = classifier()
    put_factors(model, {"bert.encoder.layer.0.intermediate.dense": 4})
    label(model)
    loaded = AutoModelForSequenceClassification.from_pretrained(save(model, tmp_path))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_transformers_alone_refuses_rather_than_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factored().save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "low_rank")  # as where this package was not imported
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_multiplied_out_is_stock(tmp_path: Path) -> None:
    model = factored()
    expected = model(tokens()).logits
    config = multiplied_out(model).config
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not shapes(model)
    assert not hasattr(config, "quantization_config")
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in RANKS)
    assert model.num_parameters() == causal_lm().num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert "low_rank" not in (tmp_path / "config.json").read_text()


def test_multiplied_out_forgets_the_grids_of_its_factors(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="integers are torchao's")
    model = ptq(factored(), "int8")
    before = set(recorded(model))
    assert {f"{name}.{part}" for name in RANKS for part in ("first", "second")} < before
    assert set(recorded(multiplied_out(model))) == {name for name in before if not name.endswith((".first", ".second"))}
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert grids_of(loaded).keys() == set(recorded(model)) != set()
    nothing_else = ptq(factored(), "int8", include=["*.first", "*.second"])
    assert not recorded(multiplied_out(nothing_else))
