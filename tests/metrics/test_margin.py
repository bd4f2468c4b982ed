import itertools
import math

import numpy as np
import pytest
import torch

from distill.metrics import margin
from distill.metrics.margin import binary_radius, radii, robust


def _corners(width: int, size: float) -> np.ndarray:
    return size * np.array(list(itertools.product([-1.0, 1.0], repeat=width)))


def _case(classes: int, width: int, points: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((classes, width), (classes,)))
    x = torch.randn(points, width, generator=rng, dtype=torch.float64)
    labels = (x @ weight.T + bias).argmax(1)
    labels[: points // 4] = torch.randint(classes, (points // 4,), generator=rng)  # some are wrong
    return x, weight, bias, labels


def test_two_classes_hold_in_the_whole_ball_and_not_beyond():
    x, weight, bias, labels = _case(2, 4, 40)
    w, b, signs = weight[1] - weight[0], float(bias[1] - bias[0]), 2 * labels - 1
    for point, sign, radius in zip(x, signs, binary_radius(x, w, b, signs), strict=True):
        right = [
            (sign * ((point + torch.from_numpy(_corners(4, max(0.0, float(radius)) * size))) @ w + b) > 0).all()
            for size in (0, 0.999, 1.001)
        ]
        assert right == ([True, True, False] if radius > 0 else [False] * 3)


@pytest.mark.parametrize("budget", [margin.ALL, 0], ids=["all", "nearest"])
def test_several_classes_hold_in_the_whole_ball_and_not_beyond(budget: int):
    x, weight, bias, labels = _case(5, 4, 60)
    found = radii(x, weight, bias, labels, budget)
    assert found.exact
    assert found.competitors == 4
    assert (found.values <= 0).any()
    for point, label, radius in zip(x, labels, found.values, strict=True):
        moved = [point + torch.from_numpy(_corners(4, max(0.0, float(radius)) * size)) for size in (0, 0.999, 1.001)]
        right = [bool(((x @ weight.T + bias).argmax(1) == label).all()) for x in moved]
        assert right == ([True, True, False] if radius > 0 else [False] * 3)


def test_two_classes_are_several_classes():
    x, weight, bias, labels = _case(2, 6, 30)
    both = binary_radius(x, weight[1] - weight[0], float(bias[1] - bias[0]), 2 * labels - 1)
    torch.testing.assert_close(radii(x, weight, bias, labels).values, both)


def test_the_nearest_classes_bound_the_radius_from_above():
    x, weight, bias, labels = _case(300, 3, 50, seed=1)
    exact, few = radii(x, weight, bias, labels), radii(x, weight, bias, labels, budget=0)
    assert (exact.exact, exact.competitors) == (True, 299)
    assert (few.exact, few.competitors) == (False, 50)
    assert (few.values >= exact.values).all()
    logits = (x @ weight.T + bias).numpy()
    for i, y in enumerate(labels.tolist()):
        nearest = [j for j in np.argsort(-logits[i]) if j != y][:50]
        by_hand = min((logits[i, y] - logits[i, j]) / np.abs(weight[y] - weight[j]).sum().item() for j in nearest)
        assert few.values[i].item() == pytest.approx(by_hand)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    x, weight, bias, labels = _case(70, 3, 50)
    whole = [radii(x, weight, bias, labels, budget).values for budget in (margin.ALL, 0)]
    monkeypatch.setattr(margin, "ROOM", 7 * 50 * 3)
    for budget, values in zip((margin.ALL, 0), whole, strict=True):
        torch.testing.assert_close(radii(x, weight, bias, labels, budget).values, values)


def test_classes_with_the_same_weights_are_told_apart_by_their_biases():
    weight, bias = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0])
    found = radii(torch.zeros(2, 2), weight, bias, torch.tensor([0, 1]))
    assert found.values.tolist() == [math.inf, -1.0]


def test_half_precision_is_computed_in_float32():
    x, weight, _, labels = _case(4, 8, 20)
    found = radii(x.half(), weight.half(), None, labels)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(
        found.values.double(), radii(x.half().double(), weight.half().double(), None, labels).values, rtol=1e-4, atol=1e-5
    )


def test_at_its_radius_a_point_is_not_robust():
    assert robust(torch.tensor([0.1, 0.2, 0.3]), 0.2).tolist() == [False, False, True]
