"""Movement pruning with a soft threshold: training itself finds how many weights each matrix needs."""

from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from distill.callbacks.masking import Masking
from distill.compress.mask import MovementMask, masks_of
from distill.compress.pruner import Weights
from distill.compress.scores import soft_mask, soft_penalty_gradient
from distill.compress.sparsity import cubic
from distill.parallel.gather import whole
from distill.parallel.gradients import KeepsGradients
from distill.types import Batch, ConfigError


class SoftMovementPruning(Masking):
    """Masks the weights whose score S has `σ(S) ≤ τ`, and adds `λ · mean σ(S)` to the loss; Sanh et al. 2020, arXiv 2005.07683, section 4.

    λ grows on the cubic schedule of `Pruning`; what sparsity it leads to is seen in the log. Its gradient is in closed form and the same
    on every rank, so it is added once to the gradient of the whole global batch, just before it is clipped: it is neither divided by
    the accumulation nor scaled with a float16 loss, and no loss has to know of it. (`train/loss` is without it.)

    Args:
        penalty: λ > 0, in the end; some hundreds are in use for BERT-base. What fits a model is seen in `train/sparsity`.
        threshold: τ, in (0, 1/2): all scores begin at 0, where σ is 1/2.
        rate: learning rate of the scores as a multiple of the optimizer's; the paper's is 1e-2 beside 3e-5. They must come as far as
            σ⁻¹(τ), −2.2 for τ = 0.1.
        include: patterns of the names of the linears, e.g. `*.mlp.*`; None for all but the head.
        exclude: patterns of those to leave out.
        begin, end: shares of all optimizer steps; λ grows from 0 to `penalty` between them.
        every: optimizer steps between two masks.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        penalty: float = 400.0,
        threshold: float = 0.1,
        rate: float = 300.0,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 1,
    ) -> None:
        self.check_ranges(
            ("penalty", penalty, penalty > 0, "above 0; without it nothing is masked"),
            ("threshold", threshold, 0 < threshold < 0.5, "in (0, 0.5), for all scores begin at σ(0) = 0.5"),
            ("rate", rate, rate > 0, "above 0"),
        )
        self.penalty, self.threshold, self.rate = penalty, threshold, rate
        kind = partial(MovementMask, rate=rate)
        super().__init__(Weights(kind, "layer", include, exclude, self.key()), begin, end, every)

    @property
    def remembers(self) -> bool:
        """Its scores are learned."""
        return True

    def summary(self) -> list[str]:
        """What is pruned, how, and how far it has come."""
        line = f"σ(S) ≤ {self.threshold:g} by soft movement, λ to {self.penalty:g} from {self.begin:.0%} to {self.end:.0%} of the steps"
        return [line, *super().summary()]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse gradients that are out of reach.

        Raises:
            ConfigError: DeepSpeed in float16 keeps them scaled by a factor of its own.
        """
        super().on_fit_start(trainer, pl_module)
        if isinstance(trainer.strategy, KeepsGradients) and str(trainer.precision).startswith("16"):
            raise ConfigError(
                f"{self.key()}: DeepSpeed's float16 gradients cannot be added to; take trainer.precision=bf16-mixed, or Pruning"
            )

    def update(self, trainer: pl.Trainer, step: int, first: int, last: int, batch: Batch) -> None:
        """Compare the scores with the threshold."""
        if step < first or (step - first) % self.every:
            return
        assert self.student is not None, "on_fit_start comes first"
        for name, (_, mask) in masks_of(self.student, self.pruner.owner).items():
            mask.mask.copy_(soft_mask(self.pruner.score_of(self.student, name, "movement", 0, {}), self.threshold))

    def strength(self, trainer: pl.Trainer) -> float:
        """λ of this step."""
        first, last = self.span(trainer)
        return cubic(min(1.0, (trainer.global_step - first) / max(1, last - first)), self.penalty) if trainer.global_step >= first else 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Add the gradient of λ · mean σ(S)."""
        strength = self.strength(trainer)
        if not strength:
            return
        assert self.student is not None, "on_fit_start comes first"
        masks = [mask for _, mask in masks_of(self.student, self.pruner.owner).values() if isinstance(mask, MovementMask)]
        count = sum(mask.mask.numel() for mask in masks)
        kept = isinstance(trainer.strategy, KeepsGradients)
        for mask in masks:
            with whole([mask.scores]):
                gradient = soft_penalty_gradient(self.rate * mask.scores.detach(), strength, count)
            if kept:
                _add_in_deepspeed(mask.scores, gradient)
            elif mask.scores.grad is not None:
                mask.scores.grad.add_(gradient)


def _add_in_deepspeed(parameter: Tensor, gradient: Tensor) -> None:
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    safe_set_full_grad(parameter, safe_get_full_grad(parameter) + gradient)
