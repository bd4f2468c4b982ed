from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from distill.students.load import FromConfig, Pretrained
from distill.tasks import CausalLM, SequenceClassification
from distill.types import ConfigError
from tests.models import CONFIGS, LABELS, VOCAB, causal_lm, classifier, expected_labels, save, tokenizer, tokens

TOKENS = {"vocab_size": VOCAB}


def test_pretrained_has_the_weights_of_its_folder(tmp_path: Path) -> None:
    original = causal_lm()
    model = Pretrained(save(original, tmp_path)).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)


def test_pretrained_has_the_dtype_asked_for_not_the_checkpoints(tmp_path: Path) -> None:
    folder = save(causal_lm().to(torch.bfloat16), tmp_path)
    model = Pretrained(folder).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_pretrained_options_reach_the_model(tmp_path: Path) -> None:
    student = Pretrained(save(causal_lm(), tmp_path), attn_implementation="eager", gradient_checkpointing=True)
    model = student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing
    model(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert student.name == str(tmp_path)


def test_pretrained_refuses_another_tokenizer(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.student and data\.tokenizer have different tokenizers"):
        Pretrained(folder).build(CausalLM(), TOKENS, tokenizer(first="x"), torch.float32)


def test_pretrained_missing_folder() -> None:
    with pytest.raises(ConfigError, match=r"model\.student\.model: no folder './nothing' here"):
        Pretrained("./nothing").build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def test_pretrained_refuses_too_few_rows(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path, tokenizer(VOCAB + 2))
    with pytest.raises(ConfigError, match=r"model\.student has 40 rows for 42 tokens"):
        Pretrained(folder).build(CausalLM(), {"vocab_size": VOCAB + 2}, tokenizer(VOCAB + 2), torch.float32)


def test_a_classifier_keeps_its_head_where_the_labels_fit(tmp_path: Path) -> None:
    original = classifier()
    model = Pretrained(save(original, tmp_path)).build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32)
    torch.testing.assert_close(model.classifier.weight, original.classifier.weight)


def test_a_classifier_gets_a_new_head_for_other_labels(tmp_path: Path) -> None:
    original = classifier()
    expected = expected_labels(("no", "yes"))
    model = Pretrained(save(original, tmp_path)).build(SequenceClassification(), expected, tokenizer(), torch.float32)
    assert model.classifier.weight.shape == (2, 16)
    assert model.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(model.bert.embeddings.word_embeddings.weight, original.bert.embeddings.word_embeddings.weight)


def test_a_trained_classifier_whose_labels_are_in_another_order_is_refused(tmp_path: Path) -> None:
    folder = save(classifier(), tmp_path)
    with pytest.raises(ConfigError, match="calls class 0 'negative'"):
        Pretrained(folder).build(SequenceClassification(), expected_labels(LABELS[::-1]), tokenizer(), torch.float32)


def test_a_decoder_without_padding_token_takes_the_datas(tmp_path: Path) -> None:
    folder = save(classifier("gpt2"), tmp_path)
    assert classifier("gpt2").config.pad_token_id is None
    expected = expected_labels() | {"pad_token_id": 0}
    model = Pretrained(folder).build(SequenceClassification(), expected, tokenizer(), torch.float32).eval()
    ids = tokens(2, 6)
    ids[1, 4:] = 0
    alone = classifier("gpt2")(input_ids=ids[1:, :4]).logits  # the class is read at the last token that is no padding
    torch.testing.assert_close(model(input_ids=ids).logits[1:], alone)


class _OnlyOnAGPU(CausalLM):
    """Loads a model that says it has flash attention, which is not here to be run."""

    def load(self, name: str, key: str, **kwargs: Any) -> Any:
        model = super().load(name, key, **kwargs)
        model.config._attn_implementation = "flash_attention_2"
        return model


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash_attn is installed, so that nothing is missing")
def test_a_model_with_flash_attention_is_not_run_where_it_cannot_be(tmp_path: Path) -> None:
    model = Pretrained(save(causal_lm(), tmp_path)).build(_OnlyOnAGPU(), TOKENS, tokenizer(), torch.float32)
    with pytest.raises(Exception, match=r"."):
        model(input_ids=tokens())


def test_from_config_takes_what_the_data_decide() -> None:
    keys = {k: v for k, v in CONFIGS["llama"].items() if k != "vocab_size"}
    student = FromConfig({"model_type": "llama", **keys})
    model = student.build(CausalLM(), {"vocab_size": 33}, tokenizer(33), torch.bfloat16)
    assert model.get_output_embeddings().weight.shape == (33, 16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training
    assert student.name == "new llama"


def test_from_config_depends_on_the_seed_alone() -> None:
    student = FromConfig({"model_type": "llama", **CONFIGS["llama"]})
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(student.build(CausalLM(), TOKENS, tokenizer(), torch.float32))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_from_config_of_a_folder(tmp_path: Path) -> None:
    folder = save(classifier(), tmp_path)
    model = FromConfig(folder).build(SequenceClassification(), expected_labels(("no", "yes")), tokenizer(), torch.float32)
    assert model.classifier.weight.shape == (2, 16)
    assert model.config.label2id == {"no": 0, "yes": 1}


def test_from_config_refuses_what_contradicts_the_data() -> None:
    student = FromConfig({"model_type": "llama", **CONFIGS["llama"]})
    with pytest.raises(ConfigError, match=r"model\.student\.config\.vocab_size is 40, but the data say 33; leave the key out"):
        student.build(CausalLM(), {"vocab_size": 33}, tokenizer(33), torch.float32)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 8}, "has no model_type; say e.g. model_type: llama"),
        ({"model_type": "lama"}, r"model\.student\.config: Unrecognized model identifier: lama"),
        ({"model_type": "llama", "hidden_size": "wide"}, r"model\.student\.config: .*hidden_size"),
        ("./nothing", r"model\.student\.config: no folder './nothing' here"),
    ],
)
def test_from_config_errors_are_for_people(config: dict[str, object] | str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FromConfig(config).build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def test_from_config_refuses_a_key_that_does_not_exist() -> None:
    student = FromConfig({"model_type": "llama", **CONFIGS["llama"], "hiden_size": 8})
    with pytest.raises(ConfigError, match="hiden_size"):
        student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def test_from_config_refuses_a_head_it_cannot_apply() -> None:
    student = FromConfig({"model_type": "roberta", **CONFIGS["roberta"], "is_decoder": True})
    with pytest.raises(ConfigError, match="computes its logits in a way that is not known"):
        student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def test_a_new_classifier_from_a_dictionary_predicts_the_labels_of_the_data() -> None:
    config = {"model_type": "bert", **{k: v for k, v in CONFIGS["bert"].items() if k != "vocab_size"}}
    model = FromConfig(config).build(SequenceClassification(), TOKENS | expected_labels(), tokenizer(), torch.float32)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model(tokens()).logits.shape == (2, len(LABELS))


def test_a_new_model_runs_the_attention_asked_for() -> None:
    student = FromConfig({"model_type": "llama", **{k: v for k, v in CONFIGS["llama"].items() if k != "vocab_size"}}, "eager")
    assert student.build(CausalLM(), TOKENS, tokenizer(), torch.float32).config._attn_implementation == "eager"
