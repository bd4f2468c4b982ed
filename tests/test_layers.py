"""Layers, taps and widths of real (tiny) models, against what transformers itself gives."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.layers import Layers, layers_of
from distill.losses.attention import AttentionMaps, MiniLMRelations
from distill.losses.base import Loss
from distill.losses.features import HiddenMSE
from distill.losses.relational import RKDDistance
from distill.tasks import CausalLM, SequenceClassification, Task, unwrap
from distill.types import ConfigError
from tests.losses.dense import setting
from tests.models import CONFIGS, causal_lm, classifier, tokens

FUSED = {"gpt2", "bloom"}
ENCODERS = {"bert", "roberta", "distilbert"}
Model = tuple[PreTrainedModel, Task]


def make(kind: str, **changes: Any) -> Model:
    return (classifier(kind, **changes), SequenceClassification()) if kind in ENCODERS else (causal_lm(kind, **changes), CausalLM())


def batch(task: Task) -> dict[str, Tensor]:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    labels = torch.tensor([[0], [1], [2]]) if isinstance(task, SequenceClassification) else tokens(3).masked_fill(mask == 0, -100)
    return {"input_ids": tokens(3), "attention_mask": mask, "labels": labels}


def inputs(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in given.items() if k != "labels"}


def lora(model: PreTrainedModel) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_are_those_of_transformers(kind: str) -> None:
    model, task = make(kind)
    layers, given = layers_of(model, "model.student"), batch(task)
    assert (layers.count, layers.width, layers.heads) == (2, 16, 2)
    states = model(**inputs(given), output_hidden_states=True).hidden_states
    taps = [layers.hidden(i) for i in range(3)]
    out = task.outputs(model, given, taps)
    for i in (0, 1):
        torch.testing.assert_close(out.taps[taps[i]], states[i])
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}.get(kind)
    last = out.taps[taps[2]]
    if norm or kind in ENCODERS:  # those have no final norm
        torch.testing.assert_close(model.get_submodule(norm)(last) if norm else last, states[2])


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_maps_are_those_of_transformers(kind: str) -> None:
    model, task = make(kind, attn_implementation="eager")
    layers, given = layers_of(model, "model.student"), batch(task)
    maps = model(**inputs(given), output_attentions=True).attentions
    taps = [layers.attention_map(layer) for layer in (1, 2)]
    out = task.outputs(model, given, taps)
    for tap, expected in zip(taps, maps, strict=True):
        assert expected.shape == (3, 2, 6, 6)
        torch.testing.assert_close(out.taps[tap], expected)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", CONFIGS)
def test_projections_are_there(kind: str, wrapped: bool) -> None:
    model, task = make(kind)
    plain = layers_of(model, "model.student")
    whole = lora(model) if wrapped else model
    layers = layers_of(whole, "model.student")
    assert layers == plain or wrapped
    assert (layers.blocks, layers.attention, layers.projections) == (plain.blocks, plain.attention, plain.projections)
    assert {name: layers.widths[name] for name in plain.widths} == plain.widths
    if kind in FUSED:
        with pytest.raises(ConfigError, match=r"model\.student: its layers have no separate projections"):
            layers.projection(1, 0)
        return
    taps = [layers.projection(2, part) for part in range(3)]
    out = task.outputs(whole, batch(task), taps)
    assert [out.taps[tap].shape for tap in taps] == [(3, 6, width) for _, width in layers.projections]
    grouped = CONFIGS[kind].get("num_key_value_heads") == 1
    assert [width for _, width in layers.projections] == ([16, 8, 8] if grouped else [16, 16, 16])


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", CONFIGS)
def test_widths_are_those_of_the_outputs(kind: str, wrapped: bool) -> None:
    model, task = make(kind)
    whole = lora(model) if wrapped else model
    layers, seen = layers_of(whole, "model.student"), dict[str, int]()

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.ndim == 3:
                seen[name] = value.shape[-1]

        return hook

    for name, module in unwrap(whole).named_modules():
        module.register_forward_hook(keep(name))
    task.outputs(whole, batch(task))
    wrong = {name: (layers.widths[name], width) for name, width in seen.items() if name in layers.widths and layers.widths[name] != width}
    assert wrong == {}
    assert {name for name in seen if name.endswith((".mlp", ".ffn", ".attention", ".attn"))} <= set(layers.widths)
    assert set(layers.blocks) <= set(layers.widths)


def test_only_eager_attention_gives_maps() -> None:
    layers = layers_of(causal_lm("llama", attn_implementation="sdpa"), "model.teacher")
    with pytest.raises(ConfigError, match=r"model\.teacher runs attention as 'sdpa'.*set model\.teacher\.attn_implementation: eager"):
        layers.attention_map(1)


def test_models_without_a_list_of_layers() -> None:
    class Config:
        num_hidden_layers, hidden_size, num_attention_heads, _attn_implementation = 3, 4, 2, None

        def get_text_config(self) -> "Config":
            return self

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.layer = Config(), nn.Linear(5, 4)

    layers = layers_of(Shared(), "model.student")
    assert (layers.count, layers.attention, layers.projections, dict(layers.widths)) == (0, None, (), {"layer": 4})


def objective(loss: Loss, student: Model, teacher: Model, given: dict[str, Tensor]) -> Tensor:
    ours, theirs = (layers_of(model, who) for (model, _), who in ((student, "model.student"), (teacher, "model.teacher")))
    loss.prepare(setting(3, student=ours, teacher=theirs))
    with torch.no_grad():
        target = teacher[1].outputs(teacher[0], given, loss.teacher_taps)
    value: Tensor = loss(student[1].outputs(student[0], given, loss.student_taps), target, given)
    return value


WIDE = {"hidden_size": 24, "num_hidden_layers": 4, "head_dim": 12}


def gradients(loss: Loss, teacher: Model, wrapped: bool, checkpointing: bool) -> list[Tensor]:
    """Train a fresh student by one backward pass; give what its parameters got."""
    model, task = make("llama", attn_implementation="eager")
    torch.manual_seed(0)
    student = lora(model) if wrapped else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    value = objective(loss, (student, task), teacher, batch(task))
    assert value > 0
    value.backward()
    return [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
def test_terms_train_a_real_student(wrapped: bool) -> None:
    teacher = make("llama", seed=1, attn_implementation="eager", **WIDE)
    by_name = HiddenMSE(layers=[("model.layers.0.mlp", "model.layers.3.mlp")])
    for loss in (HiddenMSE(), by_name, AttentionMaps(), MiniLMRelations("uniform", relation_heads=4), RKDDistance()):
        plain, recomputed = (gradients(loss, teacher, wrapped, checkpointing) for checkpointing in (False, True))
        assert any((grad != 0).any() for grad in plain)
        torch.testing.assert_close(recomputed, plain)
        assert all(p.grad is None for p in teacher[0].parameters())
        assert all(p.grad is not None for p in loss.parameters())


def test_a_model_is_at_no_distance_from_itself() -> None:
    for kind in ("llama", "bert", "gpt2"):
        model = make(kind, attn_implementation="eager")
        terms = [HiddenMSE(), AttentionMaps(), RKDDistance()] + ([] if kind in FUSED else [MiniLMRelations(relation_heads=4)])
        for loss in terms:
            assert objective(loss, model, model, batch(model[1])).item() == pytest.approx(0, abs=1e-5)


def test_terms_across_architectures() -> None:
    teacher = make("bert", seed=1, attn_implementation="eager", hidden_size=24, num_hidden_layers=4)
    for loss in (HiddenMSE(), AttentionMaps(), MiniLMRelations(relation_heads=4), RKDDistance()):
        student = make("distilbert", attn_implementation="eager")
        value = objective(loss, student, teacher, batch(student[1]))
        value.backward()
        query = student[0].get_parameter("distilbert.transformer.layer.0.attention.q_lin.weight").grad
        assert value > 0
        assert query is not None
        assert query.isfinite().all()
        assert query.any()


@pytest.mark.parametrize("loss", [HiddenMSE(), MiniLMRelations(relation_heads=4), AttentionMaps()], ids=lambda x: type(x).__name__)
def test_packed_documents_are_as_if_alone(loss: Loss) -> None:
    student, teacher = make("llama", attn_implementation="eager"), make("llama", seed=1, attn_implementation="eager", **WIDE)
    ids = tokens(1, 9)
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    alone = [{"input_ids": part, "labels": part} for part in (ids[:, :4], ids[:, 4:])]
    whole = objective(loss, student, teacher, packed)
    torch.testing.assert_close(whole, sum(objective(loss, student, teacher, part) for part in alone), rtol=1e-4, atol=1e-5)


def test_hidden_states_are_numbered_from_the_embeddings() -> None:
    layers = Layers("model.student", ("h.0", "h.1"), 8, 2, "attn", (("q", 8), ("k", 4), ("v", 4)), "eager")
    assert [layers.hidden(i) for i in range(3)] == ["h.0:input", "h.0", "h.1"]
    assert layers.attention_map(2) == "h.1.attn:1"
    assert layers.projection(1, 2) == "h.0.attn.v"
