import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from distill.compress.sparsity import Scope, cubic, iterative, kept_of, largest, masks, sparsity_at


def test_cubic_by_hand() -> None:
    """(1 − p)³ of 1, 27/64, 1/8 and 0 is still to come; half way 7/8 of the sparsity is there."""
    assert [cubic(p, 0.8) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.4625, 0.7, 0.8])
    assert cubic(0.5, 0.8, initial=0.4) == pytest.approx(0.75)


def test_iterative_prunes_the_same_share_of_what_is_left() -> None:
    left = [1 - iterative(turn, 3, 0.875) for turn in (1, 2, 3)]
    assert left == pytest.approx([0.5, 0.25, 0.125])


def due(total: int, *args: object, **kwargs: object) -> dict[int, float]:
    found = {step: sparsity_at(step, *args, **kwargs) for step in range(total)}  # type: ignore[arg-type]
    return {step: value for step, value in found.items() if value is not None}


def test_when_the_cubic_schedule_is_due() -> None:
    assert list(due(20, 3, 12, 0.9, "cubic", every=4)) == [3, 7, 11, 12]
    assert due(20, 3, 12, 0.9, "cubic", every=4)[12] == 0.9
    values = list(due(20, 3, 12, 0.9).values())
    assert values == sorted(values)
    assert values[0] == 0


def test_when_the_others_are_due() -> None:
    assert due(20, 3, 12, 0.9, "one_shot") == {3: 0.9}
    assert list(due(20, 3, 12, 0.875, "iterative", turns=3)) == [3, 6, 9]
    assert due(20, 3, 12, 0.875, "iterative", turns=3)[9] == pytest.approx(0.875)
    assert due(20, 5, 5, 0.9, "iterative") == {5: pytest.approx(0.9)}
    assert due(20, 5, 5, 0.9) == {5: 0.9}


def test_learned_scores_move_masks_to_the_end() -> None:
    assert list(due(20, 3, 9, 0.9, "cubic", every=4, after=True)) == [3, 7, 9, 13, 17]
    assert list(due(20, 3, 9, 0.9, "one_shot", every=8, after=True)) == [3, 11, 19]
    # turns at 3, 7 and 12, every 5 steps from 3 on to 17, and every 5 after it
    assert list(due(40, 3, 17, 0.5, "iterative", every=5, turns=3, after=True)) == [3, 7, 8, 12, 13, 22, 27, 32, 37]
    assert due(40, 3, 17, 0.5, "iterative", every=5, turns=3, after=True)[37] == 0.5


def test_amounts_do_not_compound() -> None:
    """Masks are made from all scores each time: asked for a half twice, a half is gone."""
    scores = [torch.randn(8, 8, generator=torch.Generator().manual_seed(0))]
    first = masks(scores, 0.5, "layer")[0]
    assert torch.equal(first, masks(scores, 0.5, "layer")[0])
    assert first.sum() == 32


def test_exactly_so_many_stay_even_where_scores_are_equal() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 3.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
    assert largest(scores, 2).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
    assert largest(scores, 4).all()
    assert (kept_of(4, 0.99), kept_of(10, 0.25), kept_of(10, 0.0)) == (1, 8, 10)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.97])
def test_global_magnitude_is_that_of_torch(sparsity: float) -> None:
    layers = [nn.Linear(7, 5), nn.Linear(5, 11), nn.Linear(11, 3)]
    ours = masks([layer.weight.detach().abs() for layer in layers], sparsity, "global")
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=sparsity)
    for mask, layer in zip(ours, layers, strict=True):
        assert torch.equal(mask.float(), layer.weight_mask)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_magnitude_of_each_layer_is_that_of_torch(sparsity: float) -> None:
    layer = nn.Linear(13, 7)
    (ours,) = masks([layer.weight.detach().abs()], sparsity, "layer")
    prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(ours.float(), layer.weight_mask)


@pytest.mark.parametrize(
    ("scope", "first", "second"),
    [
        ("row", [[1, 0], [0, 1]], [[0, 1], [0, 1]]),
        ("layer", [[1, 0], [0, 1]], [[1, 1], [0, 0]]),
        ("global", [[1, 1], [1, 1]], [[0, 0], [0, 0]]),
    ],
)
def test_what_is_compared(scope: Scope, first: list[list[int]], second: list[list[int]]) -> None:
    scores = [torch.tensor([[9.0, 3.0], [5.0, 6.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.5]])]
    assert [mask.int().tolist() for mask in masks(scores, 0.5, scope)] == [first, second]
