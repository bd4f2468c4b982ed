"""The chunked objective: every token loss in one walk over the valid tokens, with the gradient computed in the forward pass.

The logits of a batch, `[N, V]` in float32, are the largest tensor of a language model's step (2 GiB for 4,096 tokens at V = 128k, times
the copies that softmax, divergence and their backward make, times two models). Here they exist for one chunk of tokens at a time:
both heads project the chunk, every term is evaluated on the shared log-probabilities, and the gradient of the features and of the
head is taken there and then, so that nothing is kept or computed again for the backward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.losses.base import TokenLoss
from distill.losses.block import Terms, trainable
from distill.losses.target import Block, Chunk, chunked
from distill.types import IGNORE_INDEX, Outputs, Target

Gradients = list[Tensor | None]

# What the largest gradient of a chunk's float16 logits is scaled to: float16 holds nothing below 6e-8 and nothing above 65,504, and a
# GradScaler's factor reaches this gradient only in the backward pass, when what was outside is gone. 2⁵ leaves room for sums over rows.
HALF_TOP = 2.0**5


class Objective(NamedTuple):
    """What the chunked pass gives, all of it sums over positions, not divided by anything.

    Attributes:
        total: `Σ_i w_i L_i`, a scalar to call `backward` on (once), in nats.
        sums: L_i by name, detached, in nats.
        squares: `Σ_n ‖∂L_i / ∂features_n‖²` by name; empty unless asked for.
    """

    total: Tensor
    sums: dict[str, Tensor]
    squares: dict[str, Tensor]


def chunked_objective(
    student: Outputs,
    teacher: Target | None,
    labels_BT: Tensor,
    losses: Mapping[str, TokenLoss],
    weights: Mapping[str, float],
    num_classes: int,
    chunk: int | None = None,
    norms: bool = False,
) -> Objective:
    """Evaluate `Σ_i w_i Σ_n L_i(n)` over the valid positions n, and its gradient.

    Args:
        student: features `[B, T, D]` and head; receives the gradient.
        teacher: the target: features `[B, T, D']` and head, or K classes of each position, or several of these; None when no loss needs
            one; receives no gradient.
        labels_BT: the class that each position predicts; positions with `IGNORE_INDEX` take no part.
        losses: the terms, by name.
        weights: w_i by the same names.
        num_classes: V, the support on which both sides are compared.
        chunk: tokens a chunk; None chooses by V and device.
        norms: whether to measure each term's gradient too; costs a matrix product per term.

    Returns:
        The weighted sum with its gradient, each term's own sum, and the squared norms.
    """
    if not losses:
        return Objective(labels_BT.new_zeros((), dtype=torch.float32), {}, {})
    wanted = teacher if any(loss.needs_teacher for loss in losses.values()) else None
    features, target, labels = flatten(student, wanted, labels_BT, num_classes)
    terms, of_head = Terms(losses, weights, num_classes), trainable(student.head)
    terms.params = [p for p in terms.params if not any(p is q for q in of_head)]
    size = chunk or chunk_size(num_classes, features.device)

    def walk(with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        tally = Tally(features, of_head, terms, with_gradient, norms)
        for rows in chunks(len(labels), size):
            with torch.set_grad_enabled(with_gradient):
                part = features[rows].detach().requires_grad_(with_gradient)
                logits = student.head(part)
            side = None if target is None else target(rows)
            flows = tally.evaluate(logits.detach(), side, labels[rows])
            del side  # before the head's gradient needs room
            tally.through_the_head(rows, part, logits, flows)
        return tally.total, tally.sums, tally.squares, tally.gradients()

    params = [*of_head, *terms.params]
    if torch.is_grad_enabled() and (features.requires_grad or params):
        total, sums, squares = GradientInForward.apply(walk, features, *params)
    else:
        total, sums, squares, _ = walk(False)
    return Objective(
        total, dict(zip(losses, sums.unbind(), strict=True)), dict(zip(losses, squares.unbind(), strict=True)) if norms else {}
    )


def flatten(student: Outputs, teacher: Target | None, labels_BT: Tensor, num_classes: int) -> tuple[Tensor, Chunk | None, Tensor]:
    """Keep the valid positions: student features `[N, D]`, the teacher's target by chunks or None, labels `[N]`."""
    valid = labels_BT != IGNORE_INDEX
    return student.features[valid], None if teacher is None else chunked(teacher, valid, num_classes), labels_BT[valid]


def chunks(n: int, size: int) -> Iterator[slice]:
    """Cut n positions into slices of `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def chunk_size(num_classes: int, device: torch.device) -> int:
    """Tokens a chunk: on a CPU at least the 512 rows that its matrix products want (docs/bench.md); on a GPU 512 MiB of float32 logits."""
    return max(512, 2**22 // num_classes) if device.type == "cpu" else max(16, 2**27 // num_classes)


def block_size(num_classes: int, device: torch.device) -> int:
    """Tokens a block: what is done element by element stays in a core's cache on a CPU, and in 128 MiB a tensor on a GPU."""
    return max(1, (2**18 if device.type == "cpu" else 2**25) // num_classes)


def _fitted(flow: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """A gradient in the dtype of the logits, and the power of two that it was multiplied by so that float16 holds it."""
    if dtype != torch.float16:
        return flow, 1.0
    largest = flow.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    scale = (HALF_TOP / largest).log2().floor().clamp(-100, 100).exp2()
    return (flow * scale).half(), scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Tally:
    """Sums and gradients over the chunks, in float32 (in bf16 a long sum stands still).

    The gradient is taken of a list of parts whose weighted sum is the objective: the objective itself or, to measure them, each term.
    """

    def __init__(self, features: Tensor, of_head: list[nn.Parameter], terms: Terms, with_gradient: bool, norms: bool) -> None:
        wide, device = _wide(features.dtype), features.device
        self.of_head, self.terms, self.with_gradient, self.norms = of_head, terms, with_gradient, norms
        self.sums, self.squares = (torch.zeros(len(terms.weights), dtype=wide, device=device) for _ in range(2))
        self.weights = torch.tensor(terms.weights, dtype=wide, device=device)
        self.of_parts = terms.weights if norms else [1.0]
        self.features = torch.zeros_like(features, dtype=wide) if with_gradient and features.requires_grad else None
        self.params: Gradients = [None] * (len(of_head) + len(terms.params))
        self.room: list[Tensor] = []

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        return (self.weights * self.sums).sum()  # no product: autocast would round it

    def evaluate(self, logits: Tensor, target: Block | None, labels: Tensor) -> list[Tensor]:
        """Evaluate a chunk, block by block; give the gradient of each part with respect to the logits."""
        flows = self._room(logits)
        for block in chunks(len(labels), block_size(self.terms.num_classes, labels.device)):
            sides = logits[block], None if target is None else target(block)
            if not self.with_gradient:
                self.sums += self.terms.sums(*sides, labels[block])
                continue
            found = self.terms.gradients(*sides, labels[block], each=self.norms)
            self.sums += found.sums
            self._sum(len(self.of_head), found.params, 1.0)
            for flow, part in zip(flows, found.flows, strict=True):
                flow[block, : self.terms.num_classes] = part
        return flows

    def through_the_head(self, rows: slice, part: Tensor, logits: Tensor, flows: list[Tensor]) -> None:
        """Take a chunk's gradients back through the head, to the features and to the head's parameters."""
        if not flows:
            return
        for i, (weight, flow) in enumerate(zip(self.of_parts, flows, strict=True)):
            if self.features is not None or self.norms:
                fitted, scale = _fitted(flow, logits.dtype)
                gradient = torch.autograd.grad(logits, part, fitted, retain_graph=True)[0].to(self.sums.dtype) / scale
                if self.norms:
                    self.squares[i] = self.squares[i] + gradient.square().sum()
                if self.features is not None:
                    self.features[rows] += gradient * weight
        if self.of_head:
            fitted, scale = _fitted(self._together(flows), logits.dtype)
            self._sum(0, torch.autograd.grad(logits, self.of_head, fitted, allow_unused=True), 1 / scale)

    def _together(self, flows: list[Tensor]) -> Tensor:
        """The gradient of the objective, from those of its parts; in the place of the first, which is not needed any more."""
        if not self.norms:
            return flows[0]
        total = flows[0].mul_(self.of_parts[0])
        for weight, flow in zip(self.of_parts[1:], flows[1:], strict=True):
            total.add_(flow, alpha=weight)
        return total

    def _room(self, logits: Tensor) -> list[Tensor]:
        """Gradients of the parts with respect to the logits: the same memory for every chunk, with zeros at the vocabulary's padding."""
        if self.with_gradient and not self.room:
            dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
            self.room = [torch.zeros_like(logits, dtype=dtype, requires_grad=False) for _ in self.of_parts]
        return [room[: len(logits)] for room in self.room]

    def _sum(self, start: int, gradients: Iterable[Tensor | None], factor: Tensor | float) -> None:
        for i, gradient in enumerate(gradients, start):
            if gradient is not None:
                wide = gradient.to(_wide(gradient.dtype))
                total = self.params[i]
                wide = wide if isinstance(factor, float) and factor == 1.0 else wide * factor
                self.params[i] = wide if total is None else total.add_(wide)

    def gradients(self) -> Gradients:
        """Give them for the features and every parameter."""
        if not self.with_gradient:
            return []
        # zeros, not None, where no token was valid: every rank must hand each parameter's gradient to DDP
        params = [*self.of_head, *self.terms.params]
        return [self.features, *(torch.zeros_like(p) if g is None else g for p, g in zip(params, self.params, strict=True))]


class GradientInForward(torch.autograd.Function):
    """Carry gradients that the forward pass has already computed to where autograd wants them."""

    @staticmethod
    def forward(ctx: Any, walk: Callable[[bool], tuple[Tensor, Tensor, Tensor, Gradients]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Walk, and keep the gradients."""
        total, sums, squares, ctx.gradients = walk(True)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(sums, squares)
        return total, sums, squares

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Hand them on, once."""
        if ctx.gradients is None:
            raise RuntimeError("the chunked objective's gradient was already used; call backward once per forward")
        gradients, ctx.gradients = ctx.gradients, None
        return (None, *(g if g is None else g.mul_(grad_total).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)))
