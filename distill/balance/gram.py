"""The exact way to measure gradients: on the parameters, one `autograd.grad` per term."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gradients = list[Tensor]


def gradients_of(
    value_of: Callable[[str], Tensor], names: Sequence[str], model: nn.Module, onto: list[Gradients] | None = None
) -> list[Gradients]:
    """Each term's gradient on the trainable parameters of a model. Does not touch `.grad`, so no strategy's hooks notice.

    Args:
        value_of: evaluates one term, a differentiable scalar; the graph below it is kept.
        names: the terms.
        model: whose trainable parameters count.
        onto: gradients of earlier micro-batches to add them to, in place, so that one term's more is held, not all.

    Returns:
        For each term, a tensor for each parameter; zeros where the term does not depend on it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def of(value: Tensor) -> Gradients:
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        return list(torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True))

    if onto is None:
        return [of(value_of(name)) for name in names]
    for name, total in zip(names, onto, strict=True):
        for part, more in zip(total, of(value_of(name)), strict=True):
            part.add_(more)
    return onto


def gram(gradients: Sequence[Gradients]) -> Tensor:
    """Inner products of gradients, `G_ij = ⟨∇L_i, ∇L_j⟩`: `[k, k]`, float64."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for parts in zip(*gradients, strict=True):
        flat = torch.stack([part.flatten() for part in parts]).double()
        products += (flat @ flat.T).cpu()
    return products
