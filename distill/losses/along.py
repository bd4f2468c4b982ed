"""Forward KL to a target that knows a few classes, with its gradient in as many numbers: what a store of such targets is read for."""

import torch
from torch import Tensor

from distill.losses.base import AlongProbs
from distill.losses.support import Distribution, Known

STEEPEST = 100.0  # p_tail / q_tail; beyond it a difference of two large numbers would be left of the gradient


def kl_to_known(student: Distribution, teacher: Known, temperature: float, factor: float) -> AlongProbs | None:
    """`c KL(p ‖ q)` on K classes and the tail, and its gradient `c / T (q − p)` with the tail's `p_tail` shared out by q.

    At a class of the tail the gradient is `c / T (1 − p_tail / q_tail) q_v`, so a multiple of q there, and K numbers say how it differs at
    the known classes. Random draws leave no tail: it is `c / T (q − p̂)`, and q_tail is not needed.

    Args:
        student: of all classes.
        teacher: what is known.
        temperature: T of both.
        factor: c.

    Returns:
        None where the student's tail is so small against the teacher's that this form would lose its digits.
    """
    logp, ids = teacher.logp(temperature), teacher.filled_ids
    known, p_tail = teacher.probs[:, :-1], teacher.probs[:, -1]
    log_q = student.logp(temperature).gather(-1, ids)
    apart = known * (logp[:, :-1] - log_q)  # 0 where a class only fills up
    scale = factor / temperature
    if teacher.no_tail:
        return AlongProbs(factor * apart.sum(-1), scale, ids, scale * known, temperature)
    q = log_q.exp().masked_fill_(teacher.fills, 0.0)
    q_tail = _without(student.probs(temperature), ids).clamp_(min=torch.finfo(q.dtype).tiny)
    steep = p_tail / q_tail
    if bool((steep > STEEPEST).any()):
        return None
    difference = q - known
    of_tail = p_tail * (logp[:, -1] - q_tail.log()) - p_tail + q_tail
    values = factor * (apart.add_(difference).sum(-1) + of_tail)
    # a q − amounts is c / T (q − p) at the known classes, with a = c / T (1 − steep)
    amounts = difference.addcmul_(q, steep[:, None] - 1).mul_(-scale)
    return AlongProbs(values, scale * (1 - steep), ids, amounts, temperature)


def _without(probs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The probability of all other classes, `[N]`, summed up: `1 − Σ q_k` would round."""
    kept = probs_NV.gather(-1, ids_NK)
    total = probs_NV.scatter_(-1, ids_NK, 0.0).sum(-1)
    probs_NV.scatter_(-1, ids_NK, kept)
    return total
