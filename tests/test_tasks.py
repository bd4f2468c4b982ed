"""Tasks: the head of the features is the model's own, taps are what the modules gave."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from distill.checks import check_head
from distill.tasks import CausalLM, SequenceClassification, Task, record, submodule, unwrap
from distill.types import ConfigError
from tests.models import causal_lm, classifier, tokens

DECODERS = ["llama", "gemma2", "granite", "cohere", "gpt2"]


ENCODERS = ["bert", "distilbert", "roberta"]


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


@pytest.mark.parametrize("model_type", DECODERS)
def test_head_of_features_is_the_models_own_logits(model_type: str) -> None:
    model, batch = causal_lm(model_type), padded()
    out = CausalLM().outputs(model, batch)
    assert out.features.shape == (2, 6, 16)
    torch.testing.assert_close(out.head(out.features), model(**batch).logits)
    check_head(CausalLM(), model, "model.student")


@pytest.mark.parametrize(
    ("model_type", "key"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling"), ("cohere", "logit_scale")]
)
def test_the_transform_is_there_to_be_missed(model_type: str, key: str) -> None:
    """Without its transform each of these models would give other logits, so that the test above can fail."""
    model = causal_lm(model_type)
    out = CausalLM().outputs(model, padded())
    bare = model.get_output_embeddings()(out.features)
    assert (bare - model(**padded()).logits).abs().max() > 0.1, key


@pytest.mark.parametrize("model_type", ENCODERS)
def test_classifier(model_type: str) -> None:
    model, batch = classifier(model_type), padded()
    out = SequenceClassification().outputs(model, batch)
    assert out.features.shape == (2, 1, 3)
    torch.testing.assert_close(out.head(out.features)[:, 0], model(**batch).logits)
    check_head(SequenceClassification(), model, "model.student")


def test_gradient_reaches_trunk_and_head() -> None:
    model = causal_lm()
    out = CausalLM().outputs(model, padded())
    out.head(out.features).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_position_ids_are_passed_on() -> None:
    model = causal_lm()
    task, ids = CausalLM(), tokens(1, 6)
    packed = task.outputs(model, {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})
    alone = task.outputs(model, {"input_ids": ids[:, 3:]})
    torch.testing.assert_close(packed.features[:, 3:], alone.features)  # two documents that do not see each other


def test_taps_are_what_the_modules_gave() -> None:
    model, batch = causal_lm(), padded()
    names = ["model.embed_tokens", "model.layers.1", "model.layers.0.mlp.act_fn"]
    out = CausalLM().outputs(model, batch, names)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert set(out.taps) == set(names)
    torch.testing.assert_close(out.taps["model.embed_tokens"], states[0])
    torch.testing.assert_close(model.model.norm(out.taps["model.layers.1"]), out.features)
    assert out.taps["model.layers.0.mlp.act_fn"].shape == (2, 6, 24)
    assert out.taps["model.layers.1"].requires_grad


def test_taps_of_a_classifier() -> None:
    model, batch = classifier(), padded()
    out = SequenceClassification().outputs(model, batch, ["bert.encoder.layer.0"])
    torch.testing.assert_close(out.taps["bert.encoder.layer.0"], model(**batch, output_hidden_states=True).hidden_states[1])


def test_the_first_item_of_a_tuple_is_kept() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x + 1, "more"

    model = nn.Sequential(Pair())
    with record(model, ["0"]) as seen:
        model(torch.zeros(1))
    assert seen["0"].item() == 1


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed() -> None:
    model = causal_lm()
    before = hooks(model)
    with record(model, ["model.layers.0"]):
        assert hooks(model) == before + 1
    assert hooks(model) == before


def test_hooks_are_removed_after_an_exception() -> None:
    model = causal_lm()
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), record(model, ["model.layers.0"]):
        raise ZeroDivisionError
    with pytest.raises(ConfigError):
        CausalLM().outputs(model, padded(), ["model.layers.0", "model.nothing"])  # the first is hooked when the second is missed
    assert hooks(model) == before


def test_an_unknown_tap_lists_what_is_there() -> None:
    model = causal_lm()
    with pytest.raises(ConfigError, match=r"tap 'model\.layer\.0': model has no 'layer'; it has embed_tokens, layers, norm, rotary_emb"):
        submodule(model, "model.layer.0")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no 'bert'; it has model, lm_head"):
        submodule(model, "bert")
    with pytest.raises(ConfigError, match="it has no submodules"):
        submodule(model, "lm_head.weight")


def lora(model: PreTrainedModel, kind: TaskType, targets: str | list[str] = "all-linear") -> Any:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type=kind))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))  # it starts at 0: no update
    return wrapped.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["body", "head too"])
def test_lora_on_a_causal_lm(targets: str | list[str]) -> None:
    plain, batch = causal_lm()(**padded()).logits, padded()
    model = lora(causal_lm(), TaskType.CAUSAL_LM, targets)
    out = CausalLM().outputs(model, batch, ["model.layers.0"])
    ours = out.head(out.features)
    torch.testing.assert_close(ours, model(**batch).logits)
    assert (ours - plain).abs().max() > 0.1  # the update is there
    assert set(out.taps) == {"model.layers.0"}  # names are those of the model inside
    check_head(CausalLM(), model, "model.student")
    assert type(unwrap(model)).__name__ == "LlamaForCausalLM"


def test_lora_on_a_classifier() -> None:
    model, batch = lora(classifier(), TaskType.SEQ_CLS), padded()
    out = SequenceClassification().outputs(model, batch, ["bert.encoder.layer.0"])
    torch.testing.assert_close(out.features[:, 0], model(**batch).logits)
    assert set(out.taps) == {"bert.encoder.layer.0"}


def test_tasks_name_what_they_count() -> None:
    tasks: list[Task] = [CausalLM(), SequenceClassification()]
    assert [task.unit for task in tasks] == ["token", "sample"]
