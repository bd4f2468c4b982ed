"""Students of low rank: the start is the best there is, and what is trained, saved and loaded is the same model."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.compress.factors import shapes
from distill.layers import layers_of
from distill.report import student
from distill.students.load import FromConfig, Pretrained
from distill.students.lora import LoRA
from distill.students.low_rank import LowRank
from distill.students.shrink import Shrunk
from distill.tasks import CausalLM, SequenceClassification
from distill.types import ConfigError
from tests import pair
from tests.models import CONFIGS, VOCAB, causal_lm, classifier, expected_labels, save, tokenizer, tokens
from tests.ranks import run_ranks

TOKENS = {"vocab_size": VOCAB}
DOWN = "model.layers.0.mlp.down_proj"


def rows() -> Iterable[Any]:
    while True:
        yield {"input_ids": tokens(8, 12)}


def build(folder: str, **options: Any) -> PreTrainedModel:
    student = LowRank(Pretrained(folder), **options)
    student.calibrate_on(rows)
    return student.build(CausalLM(), TOKENS, tokenizer(), torch.float32).eval()


def test_layers_are_the_truncated_ones(tmp_path: Path) -> None:
    whole = causal_lm()
    model = build(save(whole, tmp_path), rank=4, exclude=["*.v_proj"])
    names = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    # in · out / (in + out): 8 for q and o, 5.3 for k and v, 9.6 for the feed-forward network
    assert shapes(model) == {name: 4 for name in names if not name.endswith(("v_proj", "lm_head"))}
    expected = dict(whole.state_dict())
    for name in shapes(model):
        u, s, vt = np.linalg.svd(whole.get_submodule(name).weight.detach().numpy(), full_matrices=False)
        expected[f"{name}.weight"] = torch.from_numpy(u[:, :4] * s[:4] @ vt[:4])
    by_hand = causal_lm()
    by_hand.load_state_dict(expected)
    torch.testing.assert_close(model(tokens()).logits, by_hand(tokens()).logits, rtol=1e-3, atol=1e-3)


def test_the_whole_rank_of_a_tall_layer_changes_nothing(tmp_path: Path) -> None:
    whole = causal_lm()
    with torch.no_grad():
        whole.model.layers[0].mlp.down_proj.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 24))
    model = build(save(whole, tmp_path), energy=1 - 1e-10, include=["*layers.0.mlp.down_proj"])
    assert shapes(model) == {DOWN: 3}
    torch.testing.assert_close(model(tokens()).logits, whole(tokens()).logits, rtol=1e-3, atol=1e-3)


def test_a_layer_that_would_grow_stays_dense(tmp_path: Path) -> None:
    model = build(save(causal_lm(), tmp_path), rank=6, include=["*.0.self_attn.*"])
    assert shapes(model) == {f"model.layers.0.self_attn.{name}_proj": 6 for name in "qo"}, "k and v gain below rank 5.3"


@pytest.mark.parametrize("target", [0.7, "60%"])
def test_the_target_counts_the_whole_model(tmp_path: Path, target: Any) -> None:
    whole = causal_lm(hidden_size=32, intermediate_size=96)
    share = build(save(whole, tmp_path), target=target).num_parameters() / whole.num_parameters()
    wanted = 0.6 if target == "60%" else target
    assert wanted - 0.05 < share <= wanted


def test_what_meets_the_weights_counts(tmp_path: Path) -> None:
    """Inputs that never leave a subspace: a cut that knows them loses nothing, one that does not does."""
    whole = causal_lm()
    with torch.no_grad():
        whole.model.layers[0].mlp.up_proj.weight[4:] = 0  # so that only four neurons ever enter the second linear
    folder = save(whole, tmp_path)
    gap = lambda **options: (build(folder, rank=4, include=[f"*{DOWN}"], **options)(tokens()).logits - whole(tokens()).logits).abs().max()
    assert gap(activation_aware=True, calibration_batches=2) < 1e-3 < 0.1 < gap()


def test_a_bias_stays_and_a_head_is_left_alone(tmp_path: Path) -> None:
    whole = classifier()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("dense.bias"):
                parameter.normal_()
    student = LowRank(Shrunk(save(whole, tmp_path), layers=1), rank=5)
    model = student.build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32)
    layer = model.bert.encoder.layer[0].intermediate.dense
    assert torch.equal(layer.second.bias, whole.bert.encoder.layer[0].intermediate.dense.bias)
    assert not any("classifier" in name for name in shapes(model))
    assert student.name.startswith(f"{tmp_path} cut to ")
    assert f"+ low rank: {len(shapes(model))} layers of rank 5 to 5, " in student.name
    assert layers_of(model, "model.student").projections == (("query", 16), ("key", 16), ("value", 16))


def test_the_dtype_is_that_of_training_and_the_ranks_are_not_of_it(tmp_path: Path) -> None:
    folder = save(causal_lm(), tmp_path)
    student = LowRank(Pretrained(folder), energy=0.7)
    model = student.build(CausalLM(), TOKENS, tokenizer(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert shapes(model) == shapes(build(folder, energy=0.7))
    assert torch.equal(model.model.rotary_emb.inv_freq, causal_lm().model.rotary_emb.inv_freq), "angles are not rounded to 8 bits"


def test_a_pooler_has_one_vector_a_row(tmp_path: Path) -> None:
    """Its second moments are those of the rows, not of positions."""
    whole = classifier()
    student = LowRank(Pretrained(save(whole, tmp_path)), rank=4, include=["*pooler*"], activation_aware=True, calibration_batches=1)
    student.calibrate_on(rows)
    model = student.build(SequenceClassification(), expected_labels(), tokenizer(), torch.float32).eval()
    seen: list[torch.Tensor] = []
    whole.bert.pooler.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    whole(tokens(8, 12))
    layer, weight = model.bert.pooler.dense, whole.bert.pooler.dense.weight.detach().double()
    error = (seen[0] @ (layer.second.weight @ layer.first.weight).double().T - seen[0] @ weight.T).norm()
    singular = np.linalg.svd((seen[0] @ weight.T).detach().numpy(), compute_uv=False)
    assert float(error) == pytest.approx(float(np.sqrt((singular[4:] ** 2).sum())), rel=1e-3), "the best rank 4 of what goes out"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one of rank, energy and target"),
        ({"rank": 2, "energy": 0.5}, "give one of rank, energy and target"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"energy": 1.5}, "energy must be above 0 and at most 1, got 1.5"),
        ({"target": "0"}, "target must be a share"),
        ({"rank": 1, "calibration_batches": 0}, "at least 1, got 0"),
    ],
)
def test_mistakes_that_show_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LowRank(Pretrained("teacher"), **options)


def test_lora_as_the_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"base is LoRA.*turn them round"):
        LowRank(LoRA(Pretrained("teacher")), rank=2)


def test_a_new_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="base is FromConfig"):
        LowRank(FromConfig({"model_type": "llama", **CONFIGS["llama"]}), rank=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 16}, "no layer would become smaller: the widest gains below rank 10; take a lower rank"),
        ({"energy": 0.9999}, r"an energy of 0.9999 takes ranks from \d+; take a lower energy"),
        ({"target": 0.05}, r"rank 1 everywhere leaves [\d.]+% of the parameters, not 5.0%"),
        ({"rank": 1, "include": ["*.q_prj"]}, r"no linear layer is called '\*\.q_prj'"),
        ({"rank": 1, "include": ["lm_head"]}, "the weight of 'lm_head' is shared"),
    ],
)
def test_mistakes_that_the_model_shows(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(save(causal_lm(tie_word_embeddings=True), tmp_path), **options)


def test_a_student_of_low_rank_is_not_cut_again(tmp_path: Path) -> None:
    folder = save(build(save(causal_lm(), tmp_path / "whole"), rank=2), tmp_path / "student")
    again = Pretrained(folder).build(CausalLM(), TOKENS, tokenizer(), torch.float32)
    assert set(shapes(again).values()) == {2}
    with pytest.raises(ConfigError, match="is of low rank already; train it as it is, with Pretrained"):
        build(folder, rank=1)
    with pytest.raises(ConfigError, match="of low rank already, and factors cannot be cut; shrink first"):
        Shrunk(folder, layers=1).build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def test_without_data_it_must_not_ask_for_them(tmp_path: Path) -> None:
    student = LowRank(Pretrained(save(causal_lm(), tmp_path)), rank=2, activation_aware=True)
    with pytest.raises(ConfigError, match="no data are here for activation_aware; leave it out"):
        student.build(CausalLM(), TOKENS, tokenizer(), torch.float32)


def trained(tmp_path: Path, strategy: str) -> None:
    """Train two steps on four rows each, and save the student as a run does."""
    ranks = int(os.environ["WORLD_SIZE"])
    base = Shrunk(str(tmp_path / "teacher"), layers=1, hidden_size=16, calibration_batches=ranks)
    module = pair.module(tmp_path, student=LowRank(base, energy=0.6, activation_aware=True, calibration_batches=ranks))
    trainer = pair.trainer(max_steps=2, strategy=strategy, devices=ranks)
    trainer.fit(module, pair.data(tmp_path, batch_size=4 // ranks))
    student.save(trainer, module, tmp_path / strategy)


@pytest.mark.slow
def test_sharded_or_not_it_is_cut_trained_and_saved_alike(tmp_path: Path) -> None:
    """Calibration takes the same four rows: one batch of one process, or two of half the size on each of two ranks."""
    pair.data(tmp_path)
    run_ranks(trained, 1, tmp_path, "auto")
    expected = load_file(tmp_path / "auto/student/model.safetensors")
    assert any("first.weight" in name for name in expected)
    assert expected["model.embed_tokens.weight"].shape[1] == 16
    for strategy in ("zero3",):
        run_ranks(trained, 2, tmp_path, strategy)
        torch.testing.assert_close(load_file(tmp_path / strategy / "student/model.safetensors"), expected, rtol=1e-3, atol=1e-4)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / strategy / "student")
        assert shapes(loaded) == {name.removesuffix(".first.weight"): len(w) for name, w in expected.items() if ".first." in name}
