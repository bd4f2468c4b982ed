from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distill.students.load import FromConfig, Pretrained
from distill.students.lora import LoRA, merged
from distill.tasks import CausalLM, SequenceClassification
from distill.types import ConfigError
from tests.models import CONFIGS, VOCAB, causal_lm, classifier, expected_labels, save, tokenizer, tokens

TOKENS = {"vocab_size": VOCAB}


def test_only_the_update_is_trained_and_it_starts_at_nothing(tmp_path: Path) -> None:
    original = causal_lm()
    student = LoRA(Pretrained(save(original, tmp_path)), r=3, alpha=6)
    model = student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {3}
    torch.testing.assert_close(model.eval()(tokens()).logits, original(tokens()).logits)
    assert student.name == f"{tmp_path} + LoRA r=3"


def test_the_update_is_alpha_over_r_times_b_a(tmp_path: Path) -> None:
    student = LoRA(Pretrained(save(causal_lm(), tmp_path)), r=2, alpha=6, target_modules=["q_proj"])
    model = student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 16)
    merged = layer.base_layer.weight + 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.eval()(x), x @ merged.T)


def test_a_classifiers_head_stays_trainable(tmp_path: Path) -> None:
    student = LoRA(Pretrained(save(classifier(), tmp_path)), r=2)
    model = student.build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32)
    heads = [name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    assert heads
    out = SequenceClassification().outputs(model, {"input_ids": tokens()})
    out.features.sum().backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if name in heads)


def test_a_head_of_two_layers_is_trained_whole(tmp_path: Path) -> None:
    """peft finds DistilBERT's `classifier` by the end of the name, and its `pre_classifier` with it."""
    original = classifier("distilbert")
    model = LoRA(Pretrained(save(original, tmp_path)), r=2).build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".")[-4] for name in trained} == {"pre_classifier", "classifier"}
    assert not any("lora_" in name and "classifier" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(merged(model).eval()(tokens()).logits, original(tokens()).logits)


def test_training_mode_and_gradients(tmp_path: Path) -> None:
    model = LoRA(Pretrained(save(causal_lm(), tmp_path))).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    assert model.training
    out = CausalLM().outputs(model, {"input_ids": tokens()})
    out.head(out.features).square().sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name


def test_with_gradient_checkpointing(tmp_path: Path) -> None:
    base = Pretrained(save(causal_lm(), tmp_path), gradient_checkpointing=True)
    model = LoRA(base).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    out = CausalLM().outputs(model, {"input_ids": tokens()})
    out.head(out.features).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_new_base_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.student\.base is FromConfig, but LoRA trains an update of a base with weights; take Pretr"
    ):
        LoRA(FromConfig({"model_type": "llama", **CONFIGS["llama"]}))


def moved(model: Any) -> Any:
    """Give the update, which starts at zero, and a new head, values that show."""
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model.eval()


def test_the_merged_model_is_one_of_plain_transformers(tmp_path: Path) -> None:
    original = causal_lm()
    student = LoRA(Pretrained(save(original, tmp_path / "base")), r=2)
    model = moved(student.build(CausalLM(), TOKENS, tokenizer(), torch.float64))  # float32 rounds W x + B A x and (W + B A) x apart
    expected = model(tokens()).logits
    merged(model).save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/config.json").is_file()
    assert not (tmp_path / "merged/adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - original(tokens()).logits).abs().max() > 0.1
    assert torch.equal(model(tokens()).logits, expected), "training goes on with the model as it was"
    assert any("lora_" in name for name, _ in model.named_parameters())


def test_the_merged_classifier_has_the_new_number_of_labels(tmp_path: Path) -> None:
    labels = expected_labels(("no", "yes"))
    student = LoRA(Pretrained(save(classifier(), tmp_path / "base")), r=2)
    model = moved(student.build(SequenceClassification(), labels, tokenizer(), torch.float32))
    expected = model(input_ids=tokens()).logits
    merged(model).save_pretrained(tmp_path / "merged")
    loaded, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_lora_is_merged_as_it_is() -> None:
    model = causal_lm()
    assert merged(model) is model


def test_unknown_target_modules(tmp_path: Path) -> None:
    student = LoRA(Pretrained(save(causal_lm(), tmp_path)), target_modules=["query"])
    try:
        student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    except ConfigError:
        return
    pytest.fail("nothing was said")


def test_rank_out_of_range() -> None:
    try:
        LoRA(Pretrained("teacher"), r=0)
    except ConfigError:
        return
    pytest.fail("nothing was said")
