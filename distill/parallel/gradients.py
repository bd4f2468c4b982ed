"""Gradients of the whole model, whichever strategy holds them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class KeepsGradients(ABC):
    """A strategy that reduces, checks and clips the gradients itself, so that no parameter has a `.grad` to look at."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """The norm of the whole gradient in the last optimizer step, before clipping; not finite where the step was skipped."""


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of all `.grad` together, `sqrt(Σ ‖g‖²)`; 0 where there is none. Sharded gradients (DTensor) are summed over the ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def shards_parameters(strategy: Strategy) -> bool:
    """Whether a strategy cuts the parameters themselves into shards, so that `autograd.grad` on them has nothing whole to give."""
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)
