"""Branch points: how each term's gradient is read out of the one ordinary backward pass."""

import torch
from torch import Tensor


class Branch:
    """One term's own view of the student's taps, which sees that term's gradient and no other.

    A tap feeds the rest of the model and perhaps several terms. Each term is given a view of its own, so what flows back through the view
    is this term's gradient alone; hooks add up its squared norm. The factor that the objective multiplies the term by (weight,
    accumulation, loss scale) is read at the term's value and divided out. Nothing is computed twice, and no graph is kept.

    Args:
        taps: the activations, by name.
        measured: whether to measure; otherwise the taps are passed on as they are.

    Attributes:
        taps: the views, by the same names, until `of` was called.
        square: `Σ ‖∂L / ∂tap‖²` over the taps, float32, once the backward pass has been; 0 where the term weighs 0.
    """

    def __init__(self, taps: dict[str, Tensor], measured: bool) -> None:
        self.taps = taps
        self.square = torch.zeros(())
        self._factor = torch.zeros(())
        if measured:
            self.taps = {name: self._watched(tap) if tap.requires_grad else tap for name, tap in taps.items()}

    def _watched(self, tap: Tensor) -> Tensor:
        view = tap.view_as(tap)
        view.register_hook(self._add)
        return view

    def of(self, value: Tensor) -> Tensor:
        """Watch the factor that comes back to the term's value, a scalar; gives the value to go on with, and lets go of the taps."""
        self.taps = {}  # each holds its hook, which holds this: a circle that no collector sees, as part of it is in C++
        if not value.requires_grad:
            return value
        view = value.view_as(value)
        view.register_hook(self._keep)
        return view

    def _keep(self, gradient: Tensor) -> None:
        self._factor = gradient.detach().float()

    def _add(self, gradient: Tensor) -> None:
        factor = self._factor.to(gradient.device)
        # the factor divides before squaring: a loss scale of 2¹⁶, squared, is near the end of float32
        raw = torch.where(factor != 0, gradient.detach().float() / torch.where(factor != 0, factor, 1.0), 0.0)
        self.square = self.square.to(gradient.device) + raw.square().sum()
