"""Sparse targets of a dense case, and the float64 yardstick on bins: whole logits, coarsened position by position, and plain autograd."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.losses.base import TokenLoss
from distill.losses.chunked import chunked_objective
from distill.types import IGNORE_INDEX, SparseTarget, Target
from tests.losses.dense import Case, Reference, Result

NEVER = -690.0  # nats: as good as no probability, and still above 0 in float64, so that no 0 · (−inf) gives NaN


def teacher_logits(case: Case, rounded: bool = False) -> Tensor:
    """The teacher's logits over the classes, `[B, T, V]` in float64; `rounded` as a head of the case's dtype gives them."""
    logits = (case.teacher_features.double() @ case.teacher_weight.double().T)[..., : case.num_classes]
    return logits.to(case.teacher_features.dtype).double() if rounded else logits


def coarsened(
    logits: Tensor, k: int, temperature: float = 1.0, seed: int = 0, fills: bool = False, dtype: torch.dtype = torch.float64
) -> SparseTarget:
    """Say of k random classes, in no order, what a softmax at T gives them; with `fills` of 1 to k of them, −1 at random after the first.

    Args:
        logits: `[B, T, V]`, float64.
        k: at most V.
        temperature: T.
        seed: of the choice.
        fills: whether positions know different numbers of classes.
        dtype: of the probabilities.
    """
    rng = torch.Generator().manual_seed(seed)
    probs = (logits / temperature).softmax(-1)
    ids = torch.rand(logits.shape, generator=rng).argsort(-1)[..., :k]
    if fills:
        out = torch.rand(ids.shape, generator=rng) < 0.4
        out[..., 0] = False
        ids = ids.masked_fill(out, -1)
    known = probs.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    others = probs.scatter(-1, ids.clamp(min=0), 0.0)  # class 0 too, where −1 stands for it
    zeroth = torch.where((ids == 0).any(-1), torch.zeros(()), probs[..., 0])
    others[..., 0] = zeroth
    return SparseTarget(ids, known.to(dtype), others.sum(-1).to(dtype), temperature)


def on_bins(
    reference: Reference, student_logits_NV: Tensor, target: SparseTarget, labels_N: Tensor, never: float = NEVER, **settings: object
) -> Tensor:
    """Evaluate a reference on the coarsened distributions, `[N]`.

    A reference softens logits itself: `T · log p` of the bins are logits that give p back.

    Args:
        reference: of a loss, on raw logits.
        student_logits_NV: `[N, V]`, float64.
        target: `ids` `[N, K]`, already flat.
        labels_N: `[N]`.
        never: what stands for the logarithm of 0.
        **settings: of the loss.
    """
    t, fills = target.temperature, target.ids < 0
    logp = student_logits_NV / t
    logp = logp - logp.logsumexp(-1, keepdim=True)
    chosen = nn.functional.one_hot(target.ids.masked_fill(fills, logp.shape[-1]), logp.shape[-1] + 1)[..., :-1].any(-2)
    tail = logp.masked_fill(chosen, never).logsumexp(-1, keepdim=True)
    log_q = torch.cat([logp.gather(-1, target.ids.clamp(min=0)).masked_fill(fills, never), tail], -1)
    log_p = torch.cat([target.probs, target.tail[:, None]], -1).double().log()
    return reference(t * log_q.clamp(min=never), t * log_p.clamp(min=never), labels_N, **settings)


def flat(target: SparseTarget, labels_BT: Tensor) -> SparseTarget:
    """Keep the valid positions."""
    valid = labels_BT != IGNORE_INDEX
    return SparseTarget(target.ids[valid], target.probs[valid], target.tail[valid], target.temperature)


def expected(case: Case, target: SparseTarget, reference: Reference, rounded: bool = False, **settings: object) -> Result:
    """Value and gradients of `Σ_n reference(n)` on the bins, by autograd on whole float64 logits; `rounded` as in `Case.dense`."""
    known = flat(target, case.labels)
    return case.dense(lambda s, t, y: on_bins(reference, s, known, y, **settings), rounded=rounded)


def found(
    case: Case,
    target: Target,
    losses: Mapping[str, TokenLoss] | TokenLoss,
    weights: Mapping[str, float] | None = None,
    chunk: int = 4,
    norms: bool = False,
) -> Result:
    """Evaluate the code under test against any target."""
    named = {"it": losses} if isinstance(losses, TokenLoss) else losses
    student = case.student()
    total, _, _ = chunked_objective(
        student, target, case.labels, named, weights or dict.fromkeys(named, 1.0), case.num_classes, chunk, norms
    )
    total.backward()
    weight = next(student.head.parameters())
    assert student.features.grad is not None
    assert weight.grad is not None
    return Result(total.detach(), student.features.grad, weight.grad)


def assert_near(ours: Result, reference: Result, tolerance: float) -> None:
    """Compare value and both gradients, relative to their norms or to 0.1: few bins may agree by chance, and rounding of inputs stays."""
    for name in ("value", "features", "weight"):
        a, b = getattr(ours, name).double(), getattr(reference, name).double()
        found = float((a - b).norm() / b.norm().clamp(min=0.1))
        assert found <= tolerance, f"{name}: difference {found:.2e}, allowed {tolerance:.0e}"
