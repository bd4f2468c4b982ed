"""What is refused before training, because it would be silently wrong."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from distill.checks import check_classes, check_head, check_length, check_packing, set_padding
from distill.tasks import CausalLM
from distill.types import ConfigError
from tests.models import CONFIGS, LABELS, VOCAB, causal_lm, classifier, expected_labels, tokens

DECODERS = ["llama", "gemma2", "granite", "cohere", "gpt2"]


class _Scaled(LlamaForCausalLM):
    """An architecture that does to its logits what no config key says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        return out

    factor = 1.5


def scaled(factor: float) -> PreTrainedModel:
    model = _Scaled(AutoConfig.for_model("llama", **CONFIGS["llama"]))
    model.load_state_dict(causal_lm().state_dict())
    model.factor = factor
    return model.eval()


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 3.0])
def test_an_unknown_transform_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher: _Scaled computes its logits in a way that is not known here \(largest"):
        check_head(CausalLM(), scaled(factor), "model.teacher")


def test_a_head_with_layers_of_its_own_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", **CONFIGS["roberta"], is_decoder=True))
    with pytest.raises(ConfigError, match="RobertaForCausalLM computes its logits"):
        check_head(CausalLM(), model, "model.student")


def test_an_unknown_transform_is_refused_where_logits_are_small() -> None:
    model = scaled(1.5)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    with pytest.raises(ConfigError, match="computes its logits"):
        check_head(CausalLM(), model, "model.student")


@pytest.mark.parametrize("training", [True, False])
def test_check_head_leaves_the_mode_and_the_weights(training: bool) -> None:
    model = causal_lm().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_head(CausalLM(), model, "model.student")
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_check_head_in_bfloat16() -> None:
    for model_type in DECODERS:
        check_head(CausalLM(), causal_lm(model_type).to(torch.bfloat16), "model.student")


@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_documents_that_do_not_see_each_other(model_type: str) -> None:
    check_packing(CausalLM(), causal_lm(model_type), "model.student")


@pytest.mark.parametrize(("model_type", "name"), [("opt", "OPTForCausalLM"), ("bloom", "BloomForCausalLM")])
def test_packed_documents_that_see_each_other_are_refused(model_type: str, name: str) -> None:
    said = rf"^model\.teacher: documents packed into one window would see each other in {name}; set data\.pack: false$"
    model = causal_lm(model_type).train()
    with pytest.raises(ConfigError, match=said):
        check_packing(CausalLM(), model, "model.teacher")
    assert model.training
    check_head(CausalLM(), model, "model.teacher")  # nothing else is wrong with it


class _NoPositions(LlamaForCausalLM):
    """An architecture whose trunk takes no `position_ids`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        trunk = self.model.forward
        self.model.forward = lambda input_ids, use_cache: trunk(input_ids, use_cache=use_cache)


def test_a_model_that_takes_no_positions_cannot_be_packed() -> None:
    model = _NoPositions(AutoConfig.for_model("llama", **CONFIGS["llama"])).train()
    with pytest.raises(ConfigError, match="would see each other in _NoPositions"):
        check_packing(CausalLM(), model, "model.student")
    assert model.training


def test_rows_after_the_first_are_looked_at_too() -> None:
    """A kernel that takes the documents' limits from the first row only, as variable-length flash attention does."""
    model = causal_lm()
    trunk = model.model.forward

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        positions = position_ids.clone()
        positions[1:] = torch.arange(positions.shape[1])
        return trunk(input_ids, position_ids=positions, use_cache=use_cache)

    model.model.forward = forward
    with pytest.raises(ConfigError, match=r"set data\.pack: false"):
        check_packing(CausalLM(), model, "model.student")


@pytest.mark.parametrize("training", [True, False])
def test_check_packing_leaves_the_mode_and_no_gradient(training: bool) -> None:
    model = causal_lm().train(training)
    check_packing(CausalLM(), model, "model.student")
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_check_packing_in_bfloat16() -> None:
    check_packing(CausalLM(), causal_lm().to(torch.bfloat16), "model.student")
    with pytest.raises(ConfigError, match="would see each other"):
        check_packing(CausalLM(), causal_lm("opt").to(torch.bfloat16), "model.student")


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 32), ("distilbert", 32), ("roberta", 31), ("gpt2", 32)])
def test_the_longest_sequence_that_a_model_takes(model_type: str, positions: int) -> None:
    """One token more than `check_length` lets through breaks the forward pass; RoBERTa's first position is the padding's."""
    model = causal_lm(model_type) if model_type == "gpt2" else classifier(model_type)
    check_length(model, positions, "model.student")
    model(input_ids=tokens(2, positions))
    said = rf"model\.student has positions for {positions} tokens, but data\.max_length is {positions + 1}; lower it to {positions}$"
    with pytest.raises(ConfigError, match=said):
        check_length(model, positions + 1, "model.student")
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens(2, positions + 1))


def test_any_length_where_a_model_counts_no_positions() -> None:
    check_length(causal_lm("bloom"), 10**6, "model.student")


def test_a_vocabulary_may_be_padded_but_not_cut() -> None:
    check_classes(causal_lm(), {"vocab_size": VOCAB}, "model.teacher")
    check_classes(causal_lm(), {"vocab_size": VOCAB - 3}, "model.teacher")
    with pytest.raises(ConfigError, match=r"model\.teacher has 40 rows for 41 tokens"):
        check_classes(causal_lm(), {"vocab_size": VOCAB + 1}, "model.teacher")


def test_labels_in_the_same_order() -> None:
    check_classes(classifier(), expected_labels(), "model.teacher")
    with pytest.raises(ConfigError, match="has 3 labels, but the data have 2"):
        check_classes(classifier(), expected_labels(LABELS[:2]), "model.teacher")
    with pytest.raises(ConfigError, match="calls class 0 'negative', but the data call it 'positive'"):
        check_classes(classifier(), expected_labels(LABELS[::-1]), "model.teacher")


def test_labels_that_nobody_named_pass() -> None:
    check_classes(classifier(labels=("LABEL_0", "LABEL_1", "LABEL_2")), expected_labels(), "model.teacher")


def test_labels_that_the_data_do_not_name_pass() -> None:
    check_classes(classifier(), expected_labels(("0", "1", "2")), "model.teacher")
    with pytest.raises(ConfigError, match="calls class 0 '1', but the data call it '0'"):
        check_classes(classifier(labels=("1", "0", "2")), expected_labels(("0", "1", "2")), "model.teacher")
    with pytest.raises(ConfigError, match="calls class 2 'positive', but the data call it 'other'"):
        check_classes(classifier(), expected_labels((*LABELS[:2], "other")), "model.teacher")


def test_a_config_that_contradicts_itself_is_taken_by_its_id2label() -> None:
    model = classifier()
    model.config.label2id = {"x": 0, "y": 1, "z": 2}
    check_classes(model, expected_labels(), "model.teacher")
    model.config.id2label, model.config.label2id = {0: "x", 1: "y", 2: "z"}, expected_labels()["label2id"]
    with pytest.raises(ConfigError, match="calls class 0 'x', but the data call it 'negative'"):
        check_classes(model, expected_labels(), "model.teacher")


def test_padding_is_set_for_a_classifier_and_where_there_is_none() -> None:
    model, without = causal_lm(), causal_lm("gpt2")
    set_padding(model, {"vocab_size": VOCAB, "pad_token_id": 7})
    set_padding(without, {"vocab_size": VOCAB, "pad_token_id": 7})
    assert (model.config.pad_token_id, without.config.pad_token_id) == (0, 7)
    set_padding(model, expected_labels())
    assert model.config.pad_token_id == 0
    set_padding(model, expected_labels() | {"pad_token_id": 7})
    assert model.config.pad_token_id == 7
