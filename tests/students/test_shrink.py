"""Students cut from a teacher: what stays is the teacher's, and a stock model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from distill.students.shrink import Shrunk
from distill.tasks import CausalLM, SequenceClassification
from distill.types import ConfigError
from tests import pair
from tests.models import CONFIGS, VOCAB, causal_lm, classifier, expected_labels, save, tokenizer, tokens
from tests.ranks import run_ranks

TOKENS = {"vocab_size": VOCAB}
DEEP: dict[str, Any] = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def rows() -> Iterable[Any]:
    """Three batches; endless, so that only as many as asked for may be taken."""
    while True:
        yield {"input_ids": tokens(), "labels": tokens()}


def build(folder: str, **options: Any) -> PreTrainedModel:
    student = Shrunk(folder, **options)
    student.calibrate_on(rows)
    return student.build(CausalLM(), TOKENS, tokenizer(), torch.float32).eval()


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    return loaded


@pytest.mark.parametrize(
    ("layers", "kept"),
    [(3, [0, 2, 4]), (2, [0, 4]), (1, [0]), (4, [0, 1, 3, 4]), ("every_other", [0, 2, 4]), ([3, 1], [1, 3])],
)
def test_layers_are_those_of_a_model_made_by_hand(tmp_path: Path, layers: Any, kept: list[int]) -> None:
    whole = causal_lm(**DEEP)
    model = build(save(whole, tmp_path / "whole"), layers=layers)
    config = AutoConfig.for_model("llama", **CONFIGS["llama"] | DEEP | {"num_hidden_layers": len(kept)})
    by_hand = AutoModelForCausalLM.from_config(config).eval()
    state = whole.state_dict()
    place = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(kept)}
    by_hand.load_state_dict({name: state[_renamed(name, place)] for name in by_hand.state_dict()})
    torch.testing.assert_close(model(tokens()).logits, by_hand(tokens()).logits, rtol=0, atol=0)
    assert reloaded(model, tmp_path / "student").config.num_hidden_layers == len(kept)


def _renamed(name: str, place: dict[str, str]) -> str:
    return next((old + name.removeprefix(new) for new, old in place.items() if name.startswith(new)), name)


@pytest.mark.parametrize("tied", [False, True])
def test_everything_kept_is_the_model_itself(tmp_path: Path, tied: bool) -> None:
    whole = causal_lm(**DEEP, tie_word_embeddings=tied)
    folder = save(whole, tmp_path)
    for options in ({"target": 1.0}, {"layers": 5}, {"layers": 5, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}):
        model = build(folder, **options)
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)
        assert model.config.to_dict() | {"dtype": None} == AutoConfig.from_pretrained(folder).to_dict() | {"dtype": None}


@pytest.mark.parametrize("importance", ["activation", "weights"])
def test_parts_that_do_nothing_leave_first(tmp_path: Path, importance: str) -> None:
    """Half the neurons, one group with its two queries, and one query of the group that stays do nothing: the logits stay."""
    whole = causal_lm(**DEEP)
    with torch.no_grad():
        for i, layer in enumerate(whole.model.layers):
            layer.mlp.down_proj.weight[:, i : i + 12] = 0
            if importance == "activation":  # by activation a neuron is what comes before its column
                layer.mlp.up_proj.weight[i : i + 12] = 0
            group = i % 2
            layer.self_attn.v_proj.weight[4 * group : 4 * group + 4] = 0
    model = build(
        save(whole, tmp_path / "whole"), intermediate_size=12, num_key_value_heads=1, num_attention_heads=2, importance=importance
    )
    torch.testing.assert_close(model(tokens()).logits, whole(tokens()).logits, rtol=1e-4, atol=1e-4)
    config = reloaded(model, tmp_path / "student").config
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (12, 1, 2, 4)


def test_queries_leave_within_their_groups(tmp_path: Path) -> None:
    whole = causal_lm(**DEEP)
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.self_attn.o_proj.weight[:, [*range(4), *range(12, 16)]] = 0  # head 0 of group 0, head 3 of group 1
    model = build(save(whole, tmp_path / "whole"), num_attention_heads=2, importance="weights")
    torch.testing.assert_close(model(tokens()).logits, whole(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert reloaded(model, tmp_path / "student").config.num_key_value_heads == 2


def test_a_layer_that_does_nothing_leaves_by_importance(tmp_path: Path) -> None:
    whole = causal_lm(**DEEP)
    with torch.no_grad():
        for layer in (whole.model.layers[0], whole.model.layers[3]):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model = build(save(whole, tmp_path), layers=3, layer_choice="importance")
    torch.testing.assert_close(model(tokens()).logits, whole(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("target", "by"), [(0.5, "width"), ("30 %", "width"), (0.5, "depth")])
def test_the_target_is_reached_from_below(tmp_path: Path, target: Any, by: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    whole = causal_lm(**sizes, num_hidden_layers=6)
    model = build(save(whole, tmp_path / "whole"), target=target, target_by=by, importance="weights")
    share = model.num_parameters() / whole.num_parameters()
    wanted = 0.3 if target == "30 %" else target
    assert wanted - (0.05 if by == "width" else 0.2) < share <= wanted
    reloaded(model, tmp_path / "student")
    if by == "depth":
        layer = sum(p.numel() for p in whole.model.layers[0].parameters())
        assert share > wanted - layer / whole.num_parameters(), "one more layer would have fitted"
        assert model.config.hidden_size == 64


def test_what_is_given_stays_fixed_under_a_target(tmp_path: Path) -> None:
    model = build(save(causal_lm(**DEEP), tmp_path), layers=4, hidden_size=16, target=0.6, importance="weights")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (4, 16)


@pytest.mark.parametrize("hidden", [64, 32])
def test_a_target_beside_a_hidden_size_takes_what_a_config_can_hold(tmp_path: Path, hidden: int) -> None:
    """Six heads would not divide it."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    whole = causal_lm(**sizes, num_hidden_layers=4)
    model = build(save(whole, tmp_path / "whole"), hidden_size=hidden, target=0.4, importance="weights")
    assert model.config.hidden_size == hidden
    assert 0.3 < model.num_parameters() / whole.num_parameters() <= 0.4
    reloaded(model, tmp_path / "student")


def test_heads_on_the_way_need_not_divide_the_hidden_size(tmp_path: Path) -> None:
    """24 heads in 8 groups become 12 in 6; six groups of three would be 18, of which transformers makes no model of 96."""
    sizes = {"hidden_size": 96, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 4}
    model = build(save(causal_lm(**sizes), tmp_path / "whole"), num_key_value_heads=6, num_attention_heads=12, importance="weights")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (12, 6)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (48, 96)
    reloaded(model, tmp_path / "student")


OTHER_CUTS = [{"layers": 2}, {"intermediate_size": 16, "num_key_value_heads": 1}, {"target": 0.7, "target_by": "depth"}, {"target": 0.7}]


@pytest.mark.parametrize("options", OTHER_CUTS)
@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_one_whose_hidden_size_cannot_be_cut_loses_all_else(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    whole = causal_lm(kind, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    model = build(save(whole, tmp_path / "whole"), **options)
    assert model.config.hidden_size == 16
    assert model.num_parameters() < whole.num_parameters()
    reloaded(model, tmp_path / "student")
    with pytest.raises(ConfigError, match=f"the hidden size of a model of type '{kind}' cannot be cut"):
        build(str(tmp_path / "whole"), hidden_size=8)


@pytest.mark.parametrize("options", [{"layers": 1}, {"intermediate_size": 16}, {"target": 0.9}])
@pytest.mark.parametrize("embedding", [8, 16])
def test_electra_with_embeddings_of_any_width(tmp_path: Path, embedding: int, options: dict[str, Any]) -> None:
    whole = classifier("electra", embedding_size=embedding)
    student = Shrunk(save(whole, tmp_path / "whole"), importance="weights", **options)
    model = student.build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32).eval()
    assert model.num_parameters() < whole.num_parameters()
    model.save_pretrained(tmp_path / "student")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)


def test_an_encoder_loses_heads_and_channels_together(tmp_path: Path) -> None:
    folder = save(classifier(num_attention_heads=4), tmp_path / "whole")
    student = Shrunk(folder, layers=1, num_attention_heads=3, intermediate_size=16, gradient_checkpointing=True)
    student.calibrate_on(rows)
    model = student.build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32)
    assert model.training
    assert model.is_gradient_checkpointing
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.num_hidden_layers) == (12, 3, 1)
    model(input_ids=tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path / "student")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert student.name == f"{folder} cut to {model.num_parameters() / classifier(num_attention_heads=4).num_parameters():.0%}: " + (
        "layers 0 · hidden 12 · FFN 16 · 3 heads in 3 groups"
    )


@pytest.mark.parametrize("importance", ["activation", "weights"])
def test_heads_of_an_encoder_that_do_nothing_leave_first(tmp_path: Path, importance: str) -> None:
    whole = classifier(num_attention_heads=4)
    with torch.no_grad():
        for i, layer in enumerate(whole.bert.encoder.layer):
            value = layer.attention.self.value
            for parameter in (value.weight, value.bias):
                parameter.unflatten(0, (4, -1))[[i, 2]] = 0
    student = Shrunk(save(whole, tmp_path), num_attention_heads=2, importance=importance)
    student.calibrate_on(rows)
    model = student.build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32)
    for layer in model.bert.encoder.layer:
        assert (layer.attention.self.value.weight.unflatten(0, (2, -1)).abs().amax((1, 2)) > 0).all()


def test_a_second_student_is_cut_alike_without_looking_at_data(tmp_path: Path) -> None:
    student = Shrunk(save(causal_lm(**DEEP), tmp_path), hidden_size=8, intermediate_size=8)
    student.calibrate_on(rows)
    first = student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    student.calibrate_on(lambda: iter(()))
    second = student.build(CausalLM(), TOKENS, tokenizer(), torch.bfloat16)
    assert {p.dtype for p in second.parameters()} == {torch.bfloat16}
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to cut; give layers, a size or target"),
        ({"layers": 2, "target": 0.5, "target_by": "depth"}, "give one, or target_by: width"),
        ({"target": "lots"}, r"model\.student\.target must be a share .* got 'lots'"),
        ({"target": 1.2}, "at most 1"),
        ({"layers": 2, "calibration_batches": 0}, "at least 1, got 0"),
    ],
)
def test_mistakes_that_show_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Shrunk("teacher", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 6}, "layers must be 1 to 5, as the model has, got 6"),
        ({"layers": [0, 5]}, r"different numbers from 0 to 4, as the model has, got \[0, 5\]"),
        ({"layers": []}, r"different numbers from 0 to 4, as the model has, got \[\]"),
        ({"hidden_size": 17}, "hidden must be 1 to 16, as the model has, got 17"),
        ({"num_attention_heads": 3}, "3 num_attention_heads in 2 num_key_value_heads; every group keeps as many"),
        ({"hidden_size": 9}, "transformers takes no such model"),
        ({"target": 0.01}, r"cutting by width reaches [\d.]+% of the parameters at the least, not 1.0%"),
        ({"target": 0.2, "target_by": "depth"}, r"cutting by depth reaches [\d.]+% .* take target_by: width"),
    ],
)
def test_mistakes_that_the_model_shows(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(save(causal_lm(**DEEP), tmp_path), **options)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of a model of type 'gpt2'; of these they can: llama"):
        build(save(causal_lm("gpt2"), tmp_path), layers=1)


def test_without_data_importance_must_do_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data are here to measure importance on; take importance: weights"):
        Shrunk(save(causal_lm(**DEEP), tmp_path), hidden_size=8).build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def trained(tmp_path: Path, strategy: str, devices: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a shrunk student before and after two steps, on a rank."""
    from distill.report.student import prepared

    student = Shrunk(str(tmp_path / "teacher"), layers=1, hidden_size=16, intermediate_size=16, calibration_batches=2)
    module = pair.module(tmp_path, student=student)
    trainer = pair.trainer(max_steps=2, strategy=strategy, devices=devices)
    trainer.fit(module, pair.data(tmp_path, batch_size=4))
    assert module.student is not None
    after = {name: value.detach().clone() for name, value in module.student.state_dict().items()}
    before = {}
    if trainer.is_global_zero:  # as the end of a run makes a second student on rank 0 alone
        before = prepared(module, torch.float32).state_dict()
    return before, after


def test_it_is_trained_and_every_rank_has_the_same(tmp_path: Path) -> None:
    pair.data(tmp_path)
    (before, first), (_, second) = run_ranks(trained, 2, tmp_path, "ddp", 2)
    assert first["model.embed_tokens.weight"].shape == before["model.embed_tokens.weight"].shape == (first["lm_head.weight"].shape[0], 16)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(before[name], first[name]) for name in first)
    alone, _ = trained(tmp_path, "auto", 1)
    assert all(torch.equal(before[name], alone[name]) for name in alone), "one rank cuts as two do"
