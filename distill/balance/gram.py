"""The exact way to measure gradients: on the parameters, one `autograd.grad` per term."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def gram(value_of: Callable[[str], Tensor], names: Sequence[str], model: nn.Module) -> Tensor:
    """Inner products of the terms' gradients, `G_ij = ⟨∇L_i, ∇L_j⟩` on the parameters that every term may move.

    Keeps one gradient of the model per term while it runs. Does not touch `.grad`, so no strategy's hooks notice.

    Args:
        value_of: evaluates one term, a differentiable scalar; the graph below it is kept.
        names: the terms.
        model: whose trainable parameters count.

    Returns:
        `[k, k]`, float64.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(value_of(name), parameters, retain_graph=True, materialize_grads=True) for name in names]
    products = [[sum((a.double() * b.double()).sum() for a, b in zip(x, y, strict=True)) for y in gradients] for x in gradients]
    return torch.stack([torch.stack([torch.as_tensor(value) for value in row]) for row in products])
