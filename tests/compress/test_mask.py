import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.compress.mask import DisplacementMask, Mask, MovementMask, burn, mask_of, masks_of, own_weight, parametrizations, put

MASK = torch.tensor([[True, False, True], [False, True, True]])
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def masked(kind: type[Mask] = Mask, **kwargs: float) -> tuple[nn.Linear, Mask]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2, dtype=torch.float64)
    mask = kind(module.weight, **kwargs)
    put(module, mask)
    mask.mask.copy_(MASK)
    return module, mask


def inputs() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", [Mask, DisplacementMask, MovementMask])
def test_forward_and_the_gradient_of_the_weight(kind: type[Mask]) -> None:
    module, _ = masked(kind)
    weight = parametrizations(module).original
    plain = weight.detach().clone().requires_grad_()
    for w in (module.weight, plain * MASK):
        nn.functional.linear(inputs(), w).tanh().square().sum().backward()
    assert torch.equal(weight.grad, plain.grad)
    assert not weight.grad[~MASK].any()


def test_the_gradient_of_the_scores_goes_straight_through() -> None:
    """`g · w` everywhere, with g the gradient of the masked weight, by autograd in float64; summed over two backward passes."""
    module, mask = masked(MovementMask)
    assert isinstance(mask, MovementMask)
    weight = parametrizations(module).original.detach()
    effective = (weight * MASK).requires_grad_()
    for x in (inputs(), 2 * inputs()):
        module(x).tanh().square().sum().backward()
        nn.functional.linear(x, effective, module.bias.detach()).tanh().square().sum().backward()
    assert mask.scores.grad is not None
    assert effective.grad is not None
    assert torch.allclose(mask.scores.grad.view(2, 3), effective.grad * weight, rtol=1e-12)
    assert mask.scores.grad.view(2, 3)[~MASK].all(), "where the mask is 0 as well"


@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0)]
)
def test_the_rate_is_as_another_learning_rate_of_the_scores(optimizer: Make) -> None:
    """Whatever the optimizer: S of a parameter of its own, stepped with 50 times the learning rate."""
    module, mask = masked(MovementMask, rate=50.0)
    assert isinstance(mask, MovementMask)
    ours = optimizer([mask.scores])
    own = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    reference = optimizer([own])
    reference.param_groups[0]["lr"] *= 50
    for step in range(5):
        module(inputs() + step).square().sum().backward()
        assert mask.scores.grad is not None
        own.grad = mask.scores.grad.clone()
        ours.step()
        reference.step()
        mask.scores.grad = None
    score = mask.score(parametrizations(module).original)
    assert torch.allclose(score.flatten(), own.detach().float(), rtol=1e-6)
    assert score.abs().max() > 1


def test_scores_are_not_decayed_by_custom() -> None:
    """Optimizers decay matrices, see `distill.optim.AdamW`: scores are a vector."""
    _, mask = masked(MovementMask)
    assert isinstance(mask, MovementMask)
    assert mask.scores.ndim == 1


def test_displacement_is_from_where_the_weight_began() -> None:
    module, mask = masked(DisplacementMask)
    weight = parametrizations(module).original
    with torch.no_grad():
        weight[0, 1] -= 0.25
    assert mask.score(weight).tolist() == [[0, 0.25, 0], [0, 0, 0]]


def test_masks_are_found_by_their_owner_in_a_copy_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    for i, owner in ((0, 1), (0, 2), (2, 2)):
        module = model[i]
        assert isinstance(module, nn.Linear)
        put(module, Mask(module.weight, owner=owner))
    for same in (model, copy.deepcopy(model)):
        assert list(masks_of(same, 1)) == ["0"]
        assert list(masks_of(same, 2)) == ["0", "2"]
        assert mask_of(same[1], 1) is None
        assert parametrizations(same[0])[1] is masks_of(same, 2)["0"][1]


class Round(nn.Module):
    """Stands in for a fake quantiser."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * 1024).round() / 1024


@pytest.mark.parametrize("quantised", [False, True])
def test_zeros_are_written_and_the_mask_taken_off(quantised: bool) -> None:
    module, mask = masked(MovementMask)
    if quantised:
        parametrize.register_parametrization(module, "weight", Round(), unsafe=True)
        assert not module.weight[~MASK].any(), "zeros stay zeros"
    before, weight = module(inputs()), parametrizations(module).original
    burn(module, mask)
    assert torch.equal(module(inputs()), before)
    assert parametrize.is_parametrized(module, "weight") is quantised
    if quantised:
        assert [type(each) for each in parametrizations(module)] == [Round]
        parametrize.remove_parametrizations(module, "weight")
    else:
        assert type(module) is nn.Linear
        assert module.weight is weight, "the same parameter, so a tie or an optimizer still holds"
    assert not module.weight[~MASK].any()
    assert module.weight[MASK].all()
    assert "parametrizations" not in "".join(module.state_dict())


def test_the_own_weight_is_given_without_masks() -> None:
    module, mask = masked()
    with own_weight(module, mask) as weight:
        assert weight.all()
        assert not weight.requires_grad
    plain = nn.Linear(2, 2)
    with own_weight(plain, None) as weight:
        assert torch.equal(weight, plain.weight)


def test_an_optimizer_moves_what_is_masked_but_the_masked_weight_stays_0() -> None:
    """Weight decay takes 0.1 · 0.5 of it in a step, though it has no gradient."""
    linear = nn.Linear(1, 1, bias=False)
    mask = Mask(linear.weight)
    put(linear, mask)
    mask.mask.fill_(False)
    stored = parametrizations(linear).original
    before = stored.detach().clone()
    optimizer = torch.optim.AdamW([stored], lr=0.1, weight_decay=0.5)
    linear(torch.ones(1, 1)).sum().backward()
    assert not stored.grad.any()
    optimizer.step()
    torch.testing.assert_close(stored.detach(), before * 0.95)
    assert not linear.weight.any()
