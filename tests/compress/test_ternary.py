"""Three values: the paper's formula by hand, the gradient, and the bias that the docstring states."""

import math

import pytest
import torch
from torch import Tensor

from distill.compress.ternary import absmean, ternary


def reference(weight: Tensor, group_size: int | None) -> Tensor:
    """Written from arXiv 2402.17764, eq. 1–3, in float64, one group at a time."""
    groups = [weight.double().flatten()] if group_size is None else list(weight.double().reshape(-1, group_size))
    rounded = []
    for group in groups:
        gamma = sum(abs(float(w)) for w in group) / len(group)
        rounded += [gamma * max(-1, min(1, round(float(w) / gamma))) for w in group]
    return torch.tensor(rounded, dtype=torch.float64).view_as(weight)


def test_by_hand() -> None:
    weight = torch.tensor([[4.0, -1.0], [0.5, -2.5]])  # mean of magnitudes 2
    assert ternary(weight).tolist() == [[2.0, 0.0], [0.0, -2.0]]
    assert ternary(weight, 2).tolist() == [[2.5, 0.0], [0.0, -1.5]]
    assert absmean(weight, 2).tolist() == [[2.5], [1.5]]
    assert ternary(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_pruned_weights_do_not_shrink_the_scale_of_the_others() -> None:
    weight = torch.tensor([[4.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, -3.0]])
    assert absmean(weight).tolist() == [[3.0]]
    assert absmean(weight, 4).tolist() == [[3.0], [3.0]]
    assert torch.equal(ternary(ternary(weight)), ternary(weight))


@pytest.mark.parametrize("group_size", [None, 4, 12])
def test_against_the_paper(group_size: int | None) -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ternary(weight, group_size).double(), reference(weight, group_size), rtol=1e-6, atol=0)
    for values in ternary(weight, group_size).reshape(1 if group_size is None else -1, group_size or 96):
        assert len(values.abs().unique()) <= 2, "0 and the scale, to the bit"


def test_the_gradient_passes_straight_through() -> None:
    weight = (3 * torch.randn(4, 6)).requires_grad_()
    flow = torch.randn(4, 6)
    ternary(weight).backward(flow)
    assert torch.equal(weight.grad, flow)  # type: ignore[arg-type]


def test_the_bias_that_the_docstring_states() -> None:
    w = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    q = ternary(w)
    figures = [
        float(x)
        for x in ((q - w).mean(), q.abs().mean() - w.abs().mean(), (q * w).mean(), (q - w).square().mean(), (q == 0).float().mean())
    ]
    # for N(0, 1): gamma = √(2/π), threshold gamma / 2, by integration
    gamma = math.sqrt(2 / math.pi)
    density, zeros = math.exp(-(gamma**2) / 8) / math.sqrt(2 * math.pi), math.erf(gamma / 2 / math.sqrt(2))
    slope, second = 2 * gamma * density, gamma**2 * (1 - zeros)
    expected = [0.0, gamma * (1 - zeros) - gamma, slope, second - 2 * slope + 1, zeros]
    assert figures == pytest.approx(expected, abs=3e-3)
    assert expected == pytest.approx([0.0, -0.248, 0.588, 0.263, 0.31], abs=1e-3)
    assert expected[1] / gamma == pytest.approx(-0.31, abs=1e-3)
    doc = ternary.__doc__ or ""
    assert all(text in doc for text in ("−0.248 σ", "−31 %", "0.588", "0.263 σ²", "31 % of them"))
