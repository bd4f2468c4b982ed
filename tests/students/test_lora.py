from pathlib import Path

import pytest
import torch

from distill.students.load import FromConfig, Pretrained
from distill.students.lora import LoRA
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


def test_on_a_new_model() -> None:
    base = FromConfig({"model_type": "llama", **CONFIGS["llama"]})
    model = LoRA(base, r=2).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    assert any(p.requires_grad for p in model.parameters())


def test_unknown_target_modules(tmp_path: Path) -> None:
    student = LoRA(Pretrained(save(causal_lm(), tmp_path)), target_modules=["query"])
    try:
        student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    except ConfigError:
        return
    pytest.fail("nothing was said")


def test_rank_out_of_range() -> None:
    try:
        LoRA(FromConfig({"model_type": "llama", **CONFIGS["llama"]}), r=0).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    except ConfigError:
        return
    pytest.fail("nothing was said")
