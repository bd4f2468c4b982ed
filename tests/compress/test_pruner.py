"""What is masked, and what is left when the masks are carried out."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from distill.compress import fake_quant
from distill.compress.groups import Structure
from distill.compress.mask import DisplacementMask, Mask, MovementMask, masks_of, parametrizations
from distill.compress.pruner import KINDS, Method, Parts, Pruner, Weights
from distill.compress.schemes import Scheme
from distill.compress.sparsity import Scope
from distill.types import ConfigError
from tests.compress.test_mask import Round
from tests.compress.test_structured import logits, new, reloaded
from tests.models import tokens

KEY = "trainer.callbacks: Pruning"


def magnitudes(model: PreTrainedModel, pruner: Pruner) -> dict[str, Tensor]:
    return {name: pruner.score_of(model, name, "magnitude", 0, {}) for name in pruner.names(model)}


def carried_out(model: PreTrainedModel, pruner: Pruner) -> PreTrainedModel:
    """Finish a second model of the same weights, as a run does when it saves its student."""
    another = new(model.config.model_type)
    pruner.prepare(another)
    another.load_state_dict(model.state_dict())
    pruner.finish(another)
    return another


@pytest.mark.parametrize("scope", get_args(Scope))
def test_single_weights_become_zeros(scope: Scope, tmp_path: Path) -> None:
    model, pruner = new("bert"), Weights(Mask, scope, None, ["*pooler*"], KEY)
    names = set(model.state_dict())
    pruner.prepare(model)
    assert len(pruner.names(model)) == 18
    assert pruner.counts(model)[0] == 0
    for _ in range(3):  # does not compound
        pruner.update(model, 0.75, magnitudes(model, pruner).__getitem__)
    zeros, total = pruner.counts(model)
    assert (zeros, total) == (0.75 * total, 3 * (4 * 24 * 24 + 2 * 24 * 20))
    masked = logits(model)
    done = carried_out(model, pruner)
    assert torch.equal(logits(done), masked)
    assert set(done.state_dict()) == names
    assert sum(int((m.weight == 0).sum()) for m in done.modules() if isinstance(m, nn.Linear)) == zeros
    assert torch.equal(logits(reloaded(done, tmp_path)), masked)
    assert torch.equal(logits(model), masked), "the one that is trained stays as it is"
    assert pruner.counts(model) == (zeros, total)


def test_a_mask_keeps_the_largest_of_each_row() -> None:
    model, pruner = new("bert"), Weights(Mask, "row", ["*query"], None, KEY)
    pruner.prepare(model)
    pruner.update(model, 0.5, magnitudes(model, pruner).__getitem__)
    for module, mask in masks_of(model, pruner.owner).values():
        rows = parametrizations(module).original.abs()
        assert (mask.mask.sum(1) == 12).all()
        assert (rows.masked_fill(~mask.mask, torch.inf).amin(1) >= rows.masked_fill(mask.mask, 0).amax(1)).all()


@pytest.mark.parametrize(
    ("kind", "structure"),
    [(kind, structure) for kind in ("llama", "qwen2", "qwen3", "mistral") for structure in get_args(Structure)]
    + [("bert", "neurons"), ("bert", "layers"), ("roberta", "neurons")],
)
def test_parts_are_cut_out_and_the_rest_computes_what_the_masked_model_did(kind: str, structure: Structure, tmp_path: Path) -> None:
    model, pruner = new(kind), Parts(Mask, structure, KEY)
    pruner.prepare(model)
    whole = logits(model)
    pruner.update(model, 0.5, magnitudes(model, pruner).__getitem__)
    masked = logits(model)
    assert (whole - masked).abs().max() > 1e-2
    gone, total = pruner.counts(model)
    done = carried_out(model, pruner)
    assert sum(p.numel() for p in done.parameters()) < sum(p.numel() for p in model.parameters())
    assert (logits(done) - masked).abs().max() <= 1e-5
    again = reloaded(done, tmp_path)
    assert (logits(again) - masked).abs().max() <= 1e-5
    config = again.config
    left = {
        "neurons": lambda: 3 * config.intermediate_size,
        "heads": lambda: 3 * config.num_attention_heads,
        "kv_groups": lambda: 3 * config.num_key_value_heads,
        "layers": lambda: config.num_hidden_layers,
    }[structure]()
    assert left == total - gone
    assert torch.equal(logits(model), masked), "the one that is trained stays as it is"


@pytest.mark.parametrize("kind", [MovementMask, DisplacementMask])
def test_parts_with_state_of_their_own_leave_none_behind(kind: type[Mask]) -> None:
    model, pruner = new("llama"), Parts(kind, "neurons", KEY)
    names = set(model.state_dict())
    pruner.prepare(model)
    assert len(masks_of(model, pruner.owner)) == (3 if kind is MovementMask else 9)
    score = {name: torch.randn(model.get_submodule(name).weight.shape) for name in pruner.names(model)}
    pruner.update(model, 0.5, score.__getitem__)
    masked = logits(model)
    pruner.finish(model)
    assert (logits(model) - masked).abs().max() <= 1e-5
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("structure", ["neurons", "heads", "kv_groups"])
def test_movement_of_parts_goes_straight_through_the_mask(structure: Structure) -> None:
    """Scores get `w · ∂L/∂w′`, of what is masked too: the gradient of a model that has zeros there."""
    model, by_hand = new("llama"), new("llama")
    pruner = Parts(MovementMask, structure, KEY)
    pruner.prepare(model)
    score = {name: torch.randn(model.get_submodule(name).weight.shape) for name in pruner.names(model)}
    pruner.update(model, 0.5, score.__getitem__)
    ids = tokens(3, 9)
    for name, (module, mask) in masks_of(model, pruner.owner).items():
        by_hand.get_submodule(name).weight.data *= mask.mask
        assert 0 < int(mask.mask.sum()) < mask.mask.numel(), module
    for each in (model, by_hand):
        each(input_ids=ids, labels=ids).loss.backward()
    for name, (module, mask) in masks_of(model, pruner.owner).items():
        assert isinstance(mask, MovementMask)
        expected = by_hand.get_submodule(name).weight.grad * parametrizations(module).original
        torch.testing.assert_close(mask.scores.grad, expected.detach().flatten(), rtol=1e-4, atol=1e-6)
        assert (expected[:, ~mask.mask[0]] != 0).float().mean() > 0.9


def test_where_a_weight_began_is_before_it_is_quantised() -> None:
    model, pruner = new("llama"), Weights(DisplacementMask, "layer", None, None, KEY)
    for name, module in model.named_modules():
        if name.endswith("up_proj"):
            assert isinstance(module, nn.Linear)
            fake_quant.attach(module, Scheme("int", 2, None))
    pruner.prepare(model)
    for name in pruner.names(model):
        assert not pruner.score_of(model, name, "displacement", 0, {}).any()


def test_what_is_not_masked_yet_is_not_cut() -> None:
    for structure in get_args(Structure):
        model, pruner = new("llama"), Parts(Mask, structure, KEY)
        before, names = logits(model), set(model.state_dict())
        pruner.prepare(model)
        pruner.finish(model)
        assert torch.equal(logits(model), before)
        assert set(model.state_dict()) == names


def test_another_parametrization_of_what_is_cut_is_refused_before_training() -> None:
    model, pruner = new("llama"), Parts(Mask, "neurons", KEY)
    pruner.prepare(model)
    pruner.check(model)
    parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", Round(), unsafe=True)
    with pytest.raises(ConfigError, match=r"Pruning will cut 'model.layers.1.mlp.up_proj', whose weight goes through Round of another"):
        pruner.check(model)
    layers = Parts(Mask, "layers", KEY)
    layers.prepare(model)
    layers.check(model)  # whole layers go with all that is in them
    layers.update(model, 0.4, magnitudes(model, layers).__getitem__)
    masked = logits(model)
    layers.finish(model)
    assert (logits(model) - masked).abs().max() <= 1e-5


def test_layers_are_not_taken_out_with_fake_quantised_weights() -> None:
    """The record of what is quantised would keep the layers' old numbers."""
    model, layers = new("llama"), Parts(Mask, "layers", KEY)
    fake_quant.attach(model.model.layers[1].mlp.up_proj, Scheme("int", 4, 8))
    layers.prepare(model)
    with pytest.raises(ConfigError, match=r"will cut 'model.layers.1.mlp.up_proj', whose weight goes through FakeQuantisedWeight of"):
        layers.check(model)


def test_a_share_that_would_take_nothing_is_refused() -> None:
    """Of 6 heads at a hidden size of 24, 5 cannot be loaded by Llama: 4, 3, 2 or 1 can."""
    pruner = Parts(Mask, "kv_groups", KEY)
    with pytest.raises(ConfigError, match=r"sparsity 0\.2 takes none of 6 kv_groups out.*take a sparsity of 0\.333, 0\.5, 0\.667, 0\.833$"):
        pruner.check_sparsity(new("llama", num_key_value_heads=6), 0.2)
    for fine in (0.0, 0.333, 0.5, 0.8):
        pruner.check_sparsity(new("llama", num_key_value_heads=6), fine)


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_scores(method: Method) -> None:
    model = new("bert")
    pruner = Weights(KINDS.get(method, Mask), "layer", ["*intermediate*"], None, KEY)
    pruner.prepare(model)
    names = pruner.names(model)
    norms = {name: torch.arange(24.0) for name in names}
    first, second = (model.get_submodule(name).parametrizations.weight.original.detach() for name in names[:2])
    scores = [pruner.score_of(model, name, method, 0, norms) for name in names[:2]]
    wanted = {
        "magnitude": first.abs(),
        "movement": torch.zeros(20, 24),
        "displacement": torch.zeros(20, 24),
        "wanda": first.abs() * torch.arange(24.0),
    }
    if method == "random":
        assert not torch.equal(*scores), "each matrix draws its own"
        assert torch.equal(scores[0], pruner.score_of(model, names[0], "random", 0, {}))
    else:
        assert torch.equal(scores[0], wanted[method])
    assert scores[1].shape == second.shape


def test_patterns_that_match_nothing_and_unknown_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Pruning.include: no linear layer is called '\*\.mpl\.\*'"):
        Weights(Mask, "layer", ["*.mpl.*"], None, KEY).prepare(new("llama"))
    with pytest.raises(ConfigError, match=r"Pruning\.structure=heads: attention heads cannot be taken out of a model of type 'bert'"):
        Parts(Mask, "heads", KEY).prepare(new("bert"))
