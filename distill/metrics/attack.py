"""Attacks on inputs within an ℓ∞ ball, as pure functions of the gradient: the smallest change that does the most harm to first order.

A perturbation δ is a tensor of the input's shape with `|δ| ≤ ε` everywhere; where `real` is False, e.g. at padding, it stays 0.
"""

import torch
from torch import Tensor


def fgsm(gradient: Tensor, epsilon: float, real: Tensor) -> Tensor:
    """The fast gradient sign method: `δ = ε · sign(∇L)`.

    Args:
        gradient: `[B, T, D]`, of the loss with respect to the input.
        epsilon: ε ≥ 0, in the input's units.
        real: `[B, T]`, boolean: which positions may be changed.

    Reference: Goodfellow et al. 2015, arXiv 1412.6572.
    """
    return epsilon * gradient.sign() * real[..., None]


def project(delta: Tensor, epsilon: float) -> Tensor:
    """The nearest perturbation in the ball, `clip(δ, −ε, ε)`."""
    return delta.clamp(-epsilon, epsilon)


def pgd_start(like: Tensor, epsilon: float, real: Tensor, generator: torch.Generator) -> Tensor:
    """Where projected gradient descent begins: uniform in the ball.

    Args:
        like: `[B, T, D]`, whose shape, dtype and device δ has.
        epsilon: ε.
        real: `[B, T]`, boolean.
        generator: on the CPU, so that the draws are the same on every device.
    """
    drawn = 2 * torch.rand(like.shape, generator=generator) - 1
    return epsilon * drawn.to(like) * real[..., None]


def pgd_step(delta: Tensor, gradient: Tensor, epsilon: float, step: float, real: Tensor) -> Tensor:
    """One step of projected gradient descent: `δ ← clip(δ + α · sign(∇L), −ε, ε)`.

    Args:
        delta: `[B, T, D]`, δ.
        gradient: of the loss at the perturbed input.
        epsilon: ε.
        step: α; with n steps `2.5 ε / n` reaches every corner of the ball from everywhere in it.
        real: `[B, T]`, boolean.

    Reference: Madry et al. 2018, arXiv 1706.06083.
    """
    return project(delta + fgsm(gradient, step, real), epsilon)
