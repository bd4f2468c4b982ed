import pytest
import torch
from torch import nn

from distill.compress.scores import displacement, magnitude, movement, random, soft_mask, soft_penalty_gradient, wanda


def test_magnitude_and_displacement_by_hand() -> None:
    weight, initial = torch.tensor([[1.0, -2.0], [0.0, 0.5]]), torch.tensor([[1.5, -2.0], [-1.0, -0.5]])
    assert magnitude(weight).tolist() == [[1.0, 2.0], [0.0, 0.5]]
    assert displacement(weight, initial).tolist() == [[0.5, 0.0], [1.0, 1.0]]
    assert magnitude(weight.bfloat16()).dtype == displacement(weight.bfloat16(), initial).dtype == torch.float32


def test_wanda_by_hand() -> None:
    """Two rows of inputs, (3, 0, 1) and (4, 2, 0): norms 5, 2, 1. A small weight on a loud input outweighs a large one on a quiet."""
    inputs = torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    weight = torch.tensor([[0.5, -1.0, 2.0], [-0.1, 0.5, 0.2]])
    assert torch.allclose(wanda(weight, inputs.norm(dim=0)), torch.tensor([[2.5, 2.0, 2.0], [0.5, 1.0, 0.2]]))


def test_movement_on_a_matrix_of_three_by_three_by_hand() -> None:
    """A weight that descent pushes away from 0 (gradient of the other sign) gains, one that it pulls to 0 loses."""
    weight = torch.tensor([[1.0, -1.0, 2.0], [0.5, 0.0, -2.0], [1.0, 1.0, 1.0]])
    gradient = torch.tensor([[-1.0, 1.0, 1.0], [2.0, 5.0, 1.0], [0.0, -3.0, 0.25]])
    once = movement(torch.zeros(3, 3), weight, gradient)
    assert once.tolist() == [[1.0, 1.0, -2.0], [-1.0, 0.0, 2.0], [0.0, 3.0, -0.25]]
    assert movement(once, weight, gradient, lr=0.5).tolist() == (1.5 * once).tolist()


def test_movement_is_minus_the_gradient_of_a_real_valued_mask() -> None:
    """In float64: with w′ = w · m, ∂L/∂m = w · ∂L/∂w′, which is what S descends."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 5, generator=rng, dtype=torch.float64), torch.randn(7, 5, generator=rng, dtype=torch.float64)
    mask = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    masked = (weight * mask).requires_grad_()
    nn.functional.linear(x, masked).tanh().square().sum().backward(inputs=[mask, masked])
    assert masked.grad is not None
    assert mask.grad is not None
    assert torch.allclose(movement(torch.zeros_like(weight), weight, masked.grad), -mask.grad, rtol=1e-12)


def test_random_is_the_same_again_and_no_other_seed() -> None:
    shape = torch.Size((3, 4))
    assert torch.equal(random(shape, 1), random(shape, 1))
    assert not torch.equal(random(shape, 1), random(shape, 2))


def test_the_soft_mask_and_its_penalty() -> None:
    """σ(ln 3) is 3/4; the gradient of the penalty by autograd, over two matrices together, in float64."""
    assert soft_mask(torch.tensor([0.0, -1.0, 1.1]), 0.4).tolist() == [True, False, True]
    assert soft_penalty_gradient(torch.tensor([3.0]).log(), 8.0, 3).item() == pytest.approx(8 / 3 * 3 / 16)
    scores = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (2, 5))]
    (7.0 * torch.cat([score.flatten() for score in scores]).sigmoid().mean()).backward()
    for score in scores:
        assert score.grad is not None
        assert torch.allclose(soft_penalty_gradient(score.detach(), 7.0, 22), score.grad, rtol=1e-12)
