"""Weights that visit the device; `meta` stands for it, which every machine has."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from distill.tasks import CausalLM, SequenceClassification
from distill.teachers import online
from distill.teachers.offload import Visits
from distill.teachers.online import OnlineTeacher
from distill.teachers.quantise import quantise
from tests.models import causal_lm, classifier, save, tokens

CPU, META = torch.device("cpu"), torch.device("meta")
BATCH = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 1, 6, 6)}  # such a mask is taken as it is: nobody looks at its values


def places(model: nn.Module) -> dict[str, str]:
    return {name: tensor.device.type for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def watched(model: PreTrainedModel) -> list[set[str]]:
    """Write down where the weights are whenever the first layer runs."""
    seen: list[set[str]] = []
    layer = next(module for name, module in model.named_modules() if name.endswith((".layers.0", ".layer.0")))
    layer.register_forward_pre_hook(lambda *_: seen.append(set(places(model).values())))
    return seen


def test_weights_are_there_while_the_trunk_runs_and_the_head_always() -> None:
    model, task = causal_lm().requires_grad_(False), CausalLM()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = watched(model)
    Visits(model, task.head(model), META)
    for _ in range(2):
        assert {name for name, place in places(model).items() if place == "meta"} == {"lm_head.weight", "model.rotary_emb.inv_freq"} | {
            name for name in places(model) if "rotary" in name
        }
        out = task.outputs(model, BATCH)  # ids of the CPU come along
        assert out.head(out.features).device == META
    assert seen == [{"meta"}, {"meta"}]
    for name, weight in model.named_parameters():
        assert name == "lm_head.weight" or torch.equal(weight, before[name])


def test_a_tied_embedding_stays_with_the_head() -> None:
    model = causal_lm(tie_word_embeddings=True).requires_grad_(False)
    Visits(model, CausalLM().head(model), META)
    assert places(model)["model.embed_tokens.weight"] == "meta"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert places(model)["model.norm.weight"] == "cpu"


def test_a_classifiers_head_stays() -> None:
    model, task = classifier().requires_grad_(False), SequenceClassification()
    Visits(model, task.head(model), META)
    assert {name for name, place in places(model).items() if place == "meta" and not name.startswith("bert")} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert task.outputs(model, {"input_ids": tokens()}).features.device == META
    assert places(model)["bert.pooler.dense.weight"] == "cpu"


def test_they_go_even_after_a_failure() -> None:
    model = causal_lm().requires_grad_(False)
    Visits(model, CausalLM().head(model), META)
    model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CausalLM().outputs(model, BATCH)
    assert places(model)["model.norm.weight"] == "cpu"


def test_a_weight_of_two_places_is_copied_once() -> None:
    model = causal_lm().requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with Visits(model, CausalLM().head(model), META):
        assert model.model.layers[1].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
        assert set(places(model).values()) == {"meta"}


def test_pinned_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    monkeypatch.setattr(Visits, "_place", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    model = causal_lm().requires_grad_(False)
    Visits(model, CausalLM().head(model), torch.device("cuda"))
    assert len(pinned) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_quantised_weights_visit_too(quantize: Any) -> None:
    if quantize:
        pytest.importorskip("torchao", reason="torchao is an extra")
    model = causal_lm(hidden_size=32, intermediate_size=64, head_dim=32).requires_grad_(False)
    if quantize:
        quantise(model, quantize)
    whole, task = copy.deepcopy(model), CausalLM()
    visits = Visits(model, task.head(model), META)
    with visits:
        assert set(places(model).values()) == {"meta"}
    visits.device = CPU  # a device that has values; what stays on the other gets its own back
    model.lm_head, model.model.rotary_emb = whole.lm_head, whole.model.rotary_emb
    before = dict(model.named_parameters())
    seen = watched(model)
    assert torch.equal(task.outputs(model, BATCH).features, task.outputs(whole, BATCH).features)
    assert seen == [{"cpu"}]
    assert all(weight is before[name] for name, weight in model.named_parameters())


def test_on_the_cpu_nothing_moves(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    plain, offloaded = OnlineTeacher(folder), OnlineTeacher(folder, offload=True)
    for teacher in (plain, offloaded):
        teacher.setup(CausalLM(), CPU, torch.float32)
    assert offloaded.model is not None
    assert not offloaded.model.base_model._forward_pre_hooks
    batch = {"input_ids": tokens()}
    assert torch.equal(plain(batch).features, offloaded(batch).features)


def test_an_offloaded_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "check_head", lambda *_: None)  # which looks at values
    teacher = OnlineTeacher(save(causal_lm(), tmp_path), offload=True)
    teacher.setup(CausalLM(), META, torch.float32)
    assert teacher.model is not None
    seen = watched(teacher.model)
    assert teacher(BATCH).features.device == META
    assert seen == [{"meta"}]
    teacher.setup(CausalLM(), META, torch.float32)  # a second time
    assert places(teacher.model)["model.norm.weight"] == "cpu"
    teacher.assert_frozen()
    compared = []
    monkeypatch.setattr(online, "check_same", lambda model, *_: compared.append(set(places(model).values())))
    teacher.spread(type("Strategy", (), {"root_device": META}))  # type: ignore[arg-type]
    assert compared == [{"meta"}]
