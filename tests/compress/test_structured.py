from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from distill.compress.factors import label, put_factors, shapes
from distill.compress.structured import remove_kv_groups, remove_layers, remove_neurons, remove_query_heads
from distill.types import ConfigError
from tests import models

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite")
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
SIZES = {"vocab_size": models.VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6}


def new(kind: str, **changes: Any) -> PreTrainedModel:
    """A model whose weights and biases are all of order 1, so that what is left out by mistake shows."""
    if kind in DECODERS:
        changes = {"num_key_value_heads": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "head_dim": 4} | changes
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes))
    else:
        changes = {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **SIZES | changes))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) / 3)
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=models.tokens(3, 9), attention_mask=torch.ones(3, 9, dtype=torch.long)).logits


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return again.eval()


def zero(model: PreTrainedModel, pattern: str, columns: dict[int, list[int]]) -> None:
    """Zero columns of the linear of this name in each layer, by its index."""
    with torch.no_grad():
        for i, gone in columns.items():
            model.base_model.get_submodule(pattern.format(i)).weight[:, gone] = 0


def others(count: int, gone: dict[int, list[int]]) -> list[Tensor]:
    return [torch.tensor([j for j in range(count) if j not in gone[i]]) for i in sorted(gone)]


def parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", DECODERS + ENCODERS)
def test_neurons(kind: str, tmp_path: Path) -> None:
    model = new(kind, mlp_bias=True) if kind in ("llama", "granite") else new(kind)
    gone = {0: [0, 3, 19], 1: [4, 5, 6], 2: [18, 1, 9]}
    zero(model, "layers.{}.mlp.down_proj" if kind in DECODERS else "encoder.layer.{}.output.dense", gone)
    masked, before = logits(model), parameters(model)
    remove_neurons(model, others(20, gone))
    assert model.config.intermediate_size == 17
    assert (logits(model) - masked).abs().max() <= 1e-5
    assert (logits(reloaded(model, tmp_path)) - masked).abs().max() <= 1e-5
    biased = kind in ENCODERS or kind in ("llama", "granite")
    matrices = 3 if kind in DECODERS else 2
    assert before - parameters(model) == 3 * 3 * (24 * matrices + (matrices - 1) * biased)


@pytest.mark.parametrize("kind", DECODERS)
def test_groups_of_keys_and_values(kind: str, tmp_path: Path) -> None:
    model = new(kind, attention_bias=True)
    gone = {0: [0], 1: [1], 2: [2]}
    columns = {i: list(range(8 * groups[0], 8 * groups[0] + 8)) for i, groups in gone.items()}  # 2 heads of 4
    zero(model, "layers.{}.self_attn.o_proj", columns)
    masked = logits(model)
    remove_kv_groups(model, others(3, gone))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 4)
    assert (logits(model) - masked).abs().max() <= 1e-5
    assert (logits(reloaded(model, tmp_path)) - masked).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", DECODERS)
def test_queries_of_each_group(kind: str, tmp_path: Path) -> None:
    model = new(kind, attention_bias=True)
    gone = {0: [0, 3, 4], 1: [1, 2, 5], 2: [0, 2, 4]}
    zero(model, "layers.{}.self_attn.o_proj", {i: [4 * head + j for head in heads for j in range(4)] for i, heads in gone.items()})
    masked = logits(model)
    remove_query_heads(model, others(6, gone))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (3, 3)
    assert (logits(model) - masked).abs().max() <= 1e-5
    assert (logits(reloaded(model, tmp_path)) - masked).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", DECODERS + ENCODERS)
def test_layers(kind: str, tmp_path: Path) -> None:
    model = new(kind)
    layers = model.base_model.get_submodule("layers" if kind in DECODERS else "encoder.layer")
    handle = layers[1].register_forward_hook(lambda _module, args, _output: args[0])
    passed_by = logits(model)
    handle.remove()
    assert (logits(model) - passed_by).abs().max() > 1e-2
    remove_layers(model, [2, 0])
    assert model.config.num_hidden_layers == 2
    assert (logits(model) - passed_by).abs().max() <= 1e-5
    assert (logits(reloaded(model, tmp_path)) - passed_by).abs().max() <= 1e-5


def test_what_is_left_of_layers_caches_its_keys_in_order() -> None:
    model = new("llama")
    remove_layers(model, [0, 2])
    ids = models.tokens(1, 5)
    long, short = (model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False))
    assert torch.equal(long, short)


def test_layers_of_two_kinds_keep_theirs() -> None:
    model = new("gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    remove_layers(model, [1, 2])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]


def test_what_is_cut_is_trained_as_before() -> None:
    model = new("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    remove_neurons(model, [torch.arange(7)] * 3)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.intermediate_size == 7
    assert (model.model.layers[1].mlp.down_proj.in_features, model.model.layers[1].mlp.up_proj.out_features) == (7, 7)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (lambda m: remove_neurons(m, [torch.arange(3)]), "given for 1 layers, but the model has 3"),
        (lambda m: remove_neurons(m, [torch.arange(3), torch.arange(4), torch.arange(3)]), r"keep \[3, 4, 3\] neurons"),
        (lambda m: remove_neurons(m, [torch.tensor([0, 20])] * 3), "numbers from 0 to 19"),
        (lambda m: remove_neurons(m, [torch.tensor([1, 1])] * 3), "different numbers"),
        (lambda m: remove_neurons(m, [torch.tensor([], dtype=torch.long)] * 3), "1 to 20 different"),
        (lambda m: remove_query_heads(m, [torch.tensor([0, 1, 2])] * 3), r"layer 0 would keep \[2, 1, 0\] queries"),
        (lambda m: remove_layers(m, []), "cannot stay of a model that has 3"),
        (lambda m: remove_layers(m, [3]), "cannot stay of a model that has 3"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_left_whole(remove: Any, message: str) -> None:
    model = new("llama")
    before = logits(model)
    with pytest.raises(ConfigError, match=message):
        remove(model)
    assert torch.equal(logits(model), before)


def test_a_config_that_transformers_refuses_is_refused() -> None:
    """24 is no multiple of the 5 heads that would be left; Mistral does not mind."""
    keep = [torch.arange(5)] * 3
    with pytest.raises(ConfigError, match="transformers takes no LlamaConfig with"):
        remove_kv_groups(new("llama", num_key_value_heads=6), keep)
    remove_kv_groups(new("mistral", num_key_value_heads=6), keep)


def test_heads_of_bert_are_refused() -> None:
    with pytest.raises(ConfigError, match="computes the width of a head from their number"):
        remove_kv_groups(new("bert"), [torch.arange(2)] * 3)


def test_an_unknown_architecture_is_named_with_those_that_work() -> None:
    with pytest.raises(ConfigError, match=r"type 'gpt2'; of these they can: llama, .*electra"):
        remove_neurons(models.causal_lm("gpt2"), [torch.arange(2)] * 2)


def test_the_names_of_factored_layers_follow(tmp_path: Path) -> None:
    model = new("llama")
    put_factors(model, {"model.layers.0.mlp.gate_proj": 2, "model.layers.2.mlp.up_proj": 3})
    label(model)
    remove_layers(model, [1, 2])
    model.save_pretrained(tmp_path)
    assert shapes(AutoModelForCausalLM.from_pretrained(tmp_path)) == {"model.layers.1.mlp.up_proj": 3}
