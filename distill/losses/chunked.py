"""The chunked objective: every token loss in one walk over the valid tokens, with the gradient computed in the forward pass.

The logits of a batch, `[N, V]` in float32, are the largest tensor of a language model's step (2 GiB for 4,096 tokens at V = 128k, times
the copies that softmax, divergence and their backward make, times two models). Here they exist for one chunk of tokens at a time:
both heads project the chunk, every term is evaluated on the shared log-probabilities, and the gradient of the features and of the
head is taken there and then, so that nothing is kept or computed again for the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses.base import TokenLoss
from distill.losses.support import log_probs
from distill.types import IGNORE_INDEX, ConfigError, Outputs

Gradients = list[Tensor | None]

# float16 holds nothing below 6e-8. A GradScaler's factor reaches this gradient only in the backward pass, when what was smaller is gone,
# so one of our own goes in before and, in float32, out again.
HALF_SCALE = 1024.0


def chunked_objective(
    student: Outputs,
    teacher: Outputs | None,
    labels_BT: Tensor,
    losses: Mapping[str, TokenLoss],
    weights: Mapping[str, float],
    num_classes: int,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evaluate `Σ_i w_i Σ_n L_i(n)` over the valid positions n, and its gradient.

    Args:
        student: features `[B, T, D]` and head; receives the gradient.
        teacher: features `[B, T, D']` and head, or None when no loss needs one; receives no gradient.
        labels_BT: the class that each position predicts; positions with `IGNORE_INDEX` take no part.
        losses: the terms, by name.
        weights: w_i by the same names.
        num_classes: V, the support on which both sides are compared.
        chunk: tokens a chunk; None chooses by V and device.

    Returns:
        The weighted sum, a scalar to call `backward` on (once), and each term's own sum, detached; all in nats, not divided by anything.
    """
    features, targets, labels = flatten(student, teacher, labels_BT)
    if not losses:
        return labels_BT.new_zeros((), dtype=torch.float32), {}
    params = _trainable(student.head, *losses.values())
    size = chunk or chunk_size(num_classes, features.device)

    def walk(with_gradient: bool) -> tuple[Tensor, Tensor, Gradients]:
        sums = torch.zeros(len(losses), dtype=_wide(features.dtype), device=features.device)
        total = sums.new_zeros(())
        gradients = _Accumulator(features, params) if with_gradient else None
        for rows in chunks(len(labels), size):
            with torch.set_grad_enabled(with_gradient):
                part = features[rows].detach().requires_grad_(with_gradient)
                logits = student.head(part)
                student_logp = log_probs(logits, num_classes)
            teacher_logp = _teacher_log_probs(teacher, targets, rows, num_classes)
            with torch.set_grad_enabled(with_gradient):
                terms = [_evaluate(name, loss, student_logp, teacher_logp, labels[rows]).sum() for name, loss in losses.items()]
                value = torch.stack([weights[name] * term for name, term in zip(losses, terms, strict=True)]).sum()
                scale = HALF_SCALE if logits.dtype == torch.float16 else 1.0
                if gradients is not None:
                    gradients.add(rows, torch.autograd.grad(scale * value, [part, *params], allow_unused=True), scale)
            sums += torch.stack([term.detach() for term in terms])
            total += value.detach()
        return total, sums, gradients.result() if gradients is not None else []

    if torch.is_grad_enabled() and (features.requires_grad or params):
        total, sums = _GradientInForward.apply(walk, features, *params)
    else:
        total, sums, _ = walk(False)
    return total, dict(zip(losses, sums.unbind(), strict=True))


def flatten(student: Outputs, teacher: Outputs | None, labels_BT: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Keep the valid positions: student features `[N, D]`, teacher features `[N, D']` or None, labels `[N]`."""
    valid = labels_BT != IGNORE_INDEX
    return student.features[valid], None if teacher is None else teacher.features[valid], labels_BT[valid]


def chunks(n: int, size: int) -> Iterator[slice]:
    """Cut n positions into slices of `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def chunk_size(num_classes: int, device: torch.device) -> int:
    """Tokens a chunk: on a CPU at least the 256 rows that its matrix products want (docs/bench.md); on a GPU 512 MiB of float32 logits."""
    return max(256, 2**22 // num_classes) if device.type == "cpu" else max(16, 2**27 // num_classes)


def _evaluate(name: str, loss: TokenLoss, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor) -> Tensor:
    values = loss(student_logp, teacher_logp, labels)
    if values.shape != labels.shape:
        raise ConfigError(
            f"model.losses.{name} gives shape {list(values.shape)} for {len(labels)} positions; it must give one value per position, "
            "[N], summed over the vocabulary and not averaged over positions"
        )
    return values


@torch.no_grad()
def _teacher_log_probs(teacher: Outputs | None, targets: Tensor | None, rows: slice, num_classes: int) -> Tensor | None:
    return None if teacher is None or targets is None else log_probs(teacher.head(targets[rows]), num_classes)


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that want a gradient, each once, whichever modules share it."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Accumulator:
    """Gradients over the chunks, in float32: rows of the features are set, parameters are summed (in bf16 a long sum stands still)."""

    def __init__(self, features: Tensor, params: list[nn.Parameter]) -> None:
        self.features = torch.zeros_like(features, dtype=_wide(features.dtype)) if features.requires_grad else None
        self.params = params
        self.sums: Gradients = [None] * len(params)

    def add(self, rows: slice, gradients: tuple[Tensor | None, ...], scale: float) -> None:
        first, *rest = gradients
        if self.features is not None and first is not None:
            self.features[rows] = first.to(self.features.dtype) / scale if scale != 1.0 else first
        for i, gradient in enumerate(rest):
            if gradient is not None:
                wide = gradient.to(_wide(gradient.dtype))
                total = self.sums[i]
                self.sums[i] = wide.div_(scale) if total is None else total.add_(wide, alpha=1 / scale)

    def result(self) -> Gradients:
        # zeros, not None, where no token was valid: every rank must hand each parameter's gradient to DDP
        return [self.features, *(torch.zeros_like(p) if g is None else g for p, g in zip(self.params, self.sums, strict=True))]


class _GradientInForward(torch.autograd.Function):
    """Carry gradients that the forward pass has already computed to where autograd wants them."""

    @staticmethod
    def forward(ctx: Any, walk: Callable[[bool], tuple[Tensor, Tensor, Gradients]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        total, sums, ctx.gradients = walk(True)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked objective's gradient was already used; call backward once per forward")
        gradients, ctx.gradients = ctx.gradients, None
        return (None, *(g if g is None else g.mul_(grad_total).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)))
