import pytest
import torch

from distill.metrics.attack import fgsm, pgd_start, pgd_step, project
from distill.metrics.margin import binary_radius

ALL = torch.ones(5, 3, dtype=torch.bool)


def _logistic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five points of 3 × 4 numbers, a weight for each number, and the right sides."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 3, 4, generator=rng), torch.randn(3, 4, generator=rng)
    return x, w, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])


def _gradient(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    moved = x.clone().requires_grad_()
    torch.nn.functional.softplus(-y * (moved * w).sum((1, 2))).sum().backward()
    return moved.grad


def test_one_step_against_a_linear_model_does_all_that_can_be_done():
    x, w, y = _logistic()
    moved = x + fgsm(_gradient(x, w, y), 0.1, ALL)
    torch.testing.assert_close(y * (moved * w).sum((1, 2)), y * (x * w).sum((1, 2)) - 0.1 * w.abs().sum())


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_several_steps_from_anywhere_end_in_the_same_corner(steps: int):
    x, w, y = _logistic()
    delta = pgd_start(x, 0.1, ALL, torch.Generator().manual_seed(1))
    for _ in range(steps):
        delta = pgd_step(delta, _gradient(x + delta, w, y), 0.1, 2.5 * 0.1 / steps, ALL)
    torch.testing.assert_close(delta, fgsm(_gradient(x, w, y), 0.1, ALL))


def test_a_linear_model_falls_exactly_where_its_margin_ends():
    x, w, y = _logistic()
    radius = binary_radius(x.flatten(1), w.flatten(), 0.0, y)
    for epsilon in (0.05, 0.2, 0.5):
        moved = x + fgsm(_gradient(x, w, y), epsilon, ALL)
        assert ((y * (moved * w).sum((1, 2)) > 0) == (radius > epsilon)).all()


def test_what_is_not_real_never_moves():
    x, w, y = _logistic()
    real = ALL.clone()
    real[1, 2] = real[4, 0] = False
    rng = torch.Generator().manual_seed(0)
    delta = pgd_start(x, 0.1, real, rng)
    for moved in (delta, fgsm(_gradient(x, w, y), 0.1, real), pgd_step(delta, _gradient(x, w, y), 0.1, 0.05, real)):
        assert (moved[~real] == 0).all()
        assert (moved[real] != 0).all()


def test_the_start_is_uniform_in_the_ball_and_seeded():
    like, real = torch.zeros(50, 20, 30), torch.ones(50, 20, dtype=torch.bool)
    start = pgd_start(like, 0.3, real, torch.Generator().manual_seed(2))
    assert start.abs().max() <= 0.3
    assert start.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.02)  # of a uniform distribution
    assert abs(start.mean().item()) < 0.005
    torch.testing.assert_close(start, pgd_start(like, 0.3, real, torch.Generator().manual_seed(2)))


def test_a_step_ends_in_the_ball():
    inside = pgd_step(torch.tensor([[[0.09, -0.09, 0.0]]]), torch.tensor([[[3.0, -2.0, 0.0]]]), 0.1, 0.05, ALL[:1, :1])
    torch.testing.assert_close(inside, torch.tensor([[[0.1, -0.1, 0.0]]]))
    assert project(torch.tensor([2.0, -3.0, 0.5]), 1.0).tolist() == [1.0, -1.0, 0.5]
