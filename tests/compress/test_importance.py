"""Scores, against the activations of the model taken by hand."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.compress.importance import block_influence, by_activation, by_weights, norms_of
from distill.tasks import CausalLM, SequenceClassification
from tests.models import causal_lm, classifier, tokens


def seen(model: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a submodule on `tokens()`, the two padded positions left out."""
    kept: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: kept.extend([args[0], out]))
    with torch.no_grad():
        model(input_ids=tokens(), attention_mask=MASK)
    handle.remove()
    return kept[0][MASK.bool()], kept[1][MASK.bool()]


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def test_activations_of_a_decoder_in_two_batches() -> None:
    model = causal_lm()
    rows = [{"input_ids": tokens()[i : i + 1], "attention_mask": MASK[i : i + 1], "labels": tokens()[i : i + 1]} for i in range(2)]
    scores = by_activation(model, CausalLM(), rows)
    down, out = (seen(model, f"model.layers.1.{name}")[0].double() for name in ("mlp.down_proj", "self_attn.o_proj"))
    torch.testing.assert_close(scores.neurons[1], down.abs().mean(0), rtol=1e-4, atol=1e-6)
    heads = torch.stack([out[:, :8].norm(dim=1).mean(), out[:, 8:].norm(dim=1).mean()])
    torch.testing.assert_close(scores.heads[1], heads, rtol=1e-4, atol=1e-6)
    names = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    names += ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"]
    assert sorted(norms_of(model)) == sorted(names)
    outputs = [seen(model, name)[1].double().abs().mean(0) for name in names]
    torch.testing.assert_close(scores.channels, sum(outputs) / 5, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.energies["model.norm"], seen(model, "model.norm")[0].double().square().mean(0), rtol=1e-4, atol=1e-6)
    assert scores.layers is not None
    before, after = seen(model, "model.layers.0")
    influence = 1 - (F.normalize(before, dim=1) * F.normalize(after, dim=1)).sum(1).mean().double()
    torch.testing.assert_close(scores.layers[0], influence, rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_nothing_has_no_influence() -> None:
    model = causal_lm()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.zero_()
    layers = by_activation(model, CausalLM(), [{"input_ids": tokens()}]).layers
    assert layers is not None
    assert layers[1].abs() < 1e-6 < 0.1 < layers[0]


def test_influence_by_hand() -> None:
    before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(block_influence(before, after), torch.tensor([0.0, 1.0, 2.0]))


def test_an_encoder_is_measured_too() -> None:
    model = classifier().train()
    batch = {"input_ids": tokens(), "attention_mask": MASK}
    scores = by_activation(model, SequenceClassification(), [batch])
    assert model.training
    model.eval()
    inner = seen(model, "bert.encoder.layer.0.output.dense")[0].double()
    torch.testing.assert_close(scores.neurons[0], inner.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert len(norms_of(model)) == 5
    assert [len(heads) for heads in scores.heads] == [2, 2]


@pytest.mark.parametrize("make", [causal_lm, classifier])
def test_weights_that_do_nothing_score_nothing(make: Any) -> None:
    model = make()
    layer = model.base_model.layers[0] if make is causal_lm else model.base_model.encoder.layer[0]
    down, out = ("mlp.down_proj", "self_attn.o_proj") if make is causal_lm else ("output.dense", "attention.output.dense")
    with torch.no_grad():
        layer.get_submodule(down).weight[:, 5] = 0
        layer.get_submodule(out).weight[:, 8:] = 0
    scores = by_weights(model)
    assert (scores.neurons[0] == 0).nonzero().flatten().tolist() == [5]
    assert (scores.heads[0] == 0).tolist() == [False, True]
    assert (scores.channels > 0).all()


def test_weights_by_hand() -> None:
    model = causal_lm()
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    scores = by_weights(model)
    neuron = mlp.gate_proj.weight[3].norm() * mlp.up_proj.weight[3].norm() * mlp.down_proj.weight[:, 3].norm()
    torch.testing.assert_close(scores.neurons[1][3].float(), neuron.detach())
    head = attention.o_proj.weight[:, 8:].norm() * attention.v_proj.weight.norm()  # one group, which both heads read
    torch.testing.assert_close(scores.heads[1][1].float(), head.detach())
    writers = [layer.get_submodule(n).weight[2] for layer in model.model.layers for n in ("self_attn.o_proj", "mlp.down_proj")]
    written = model.model.embed_tokens.weight[:, 2].square().mean() + sum(row.square().sum() for row in writers)
    torch.testing.assert_close(scores.channels[2].float(), written.sqrt().detach())
