"""Cutting the hidden size: what never mattered can go, and what is left is a stock model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from distill.compress.families import layers_of
from distill.compress.importance import norms_of
from distill.compress.width import remove_channels, remove_heads_of_bert
from distill.types import ConfigError
from tests.models import CONFIGS, causal_lm, classifier, tokens

KEEP = torch.tensor([11, 0, 1, 3, 4, 5, 7, 8])  # of 16, in any order
GONE = [i for i in range(16) if i not in KEEP.tolist()]


def silent(model: PreTrainedModel, channels: list[int]) -> PreTrainedModel:
    """Have nothing write to these channels."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, channels] = 0
        for layer in layers_of(model):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(name).weight[channels] = 0
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_channels_that_nothing_writes_to_do_not_matter(tmp_path: Path, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, kind, CONFIGS["llama"])
    model = silent(causal_lm(kind, tie_word_embeddings=tied, rms_norm_eps=1e-12), GONE)
    expected = model(tokens()).logits
    remove_channels(model, KEEP, dict.fromkeys(norms_of(model), 1.0))
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == 8
    assert loaded.model.layers[0].self_attn.head_dim == model.model.layers[0].self_attn.head_dim
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_gains_take_up_what_the_mean_square_loses() -> None:
    model = causal_lm()
    before = model.model.norm.weight.detach().clone()
    remove_channels(model, KEEP, dict.fromkeys(norms_of(model), 0.75))
    torch.testing.assert_close(model.model.norm.weight, before[:8] * (0.75 * 16 / 8) ** 0.5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_the_slices_of_its_weights(tmp_path: Path, kind: str) -> None:
    """A model made from the smaller config, its weights sliced by hand, by shape: 16 is the hidden size alone here, 2 heads of 8."""
    whole = classifier(kind, intermediate_size=24)
    model = classifier(kind, intermediate_size=24)
    heads = [torch.tensor([1]), torch.tensor([0])]
    remove_channels(model, KEEP)
    remove_heads_of_bert(model, heads, 8)
    config = type(whole.config).from_dict(whole.config.to_dict() | {"hidden_size": 8, "num_attention_heads": 1})
    by_hand = AutoModelForSequenceClassification.from_config(config).eval()
    keep = KEEP.sort().values
    for name, target in by_hand.state_dict().items():
        source = whole.state_dict()[name]
        if ".attention.self." in name or name.endswith("attention.output.dense.weight"):
            head = heads[int(name.split("layer.")[1][0])] * 8 + torch.arange(8)
            source = source.index_select(1 if "output" in name else 0, head)
            source = source if source.ndim == 1 else source.index_select(0 if "output" in name else 1, keep)
        else:
            for dim, size in enumerate(source.shape):
                source = source.index_select(dim, keep) if size == 16 else source
        target.copy_(source)
    expected = by_hand(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_all_channels_are_the_model_itself() -> None:
    model = causal_lm()
    parameters = list(model.parameters())
    remove_channels(model, torch.arange(16), dict.fromkeys(norms_of(model), 0.5))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden size of a model of type 'gemma2' cannot be cut; of these it can: llama, mistral"):
        remove_channels(causal_lm("gemma2"), KEEP)


@pytest.mark.parametrize("keep", [[], [0, 0], [16], [-1, 3]])
def test_channels_that_there_are_not(keep: list[int]) -> None:
    with pytest.raises(ConfigError, match="1 to 16 different numbers from 0 to 15"):
        remove_channels(causal_lm(), torch.tensor(keep, dtype=torch.long))
