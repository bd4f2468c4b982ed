"""What is kept of a teacher's distribution: its likeliest classes with the tail, random draws, or both. Pure functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from distill.types import ConfigError

NOTHING = 1e-30  # mass below which nothing is drawn: float32 would round the shares of it


class Sparse(NamedTuple):
    """K classes of each of N positions. `Σ_k probs + tail = 1`.

    Attributes:
        ids: `[N, K]`, int64, different classes, the likeliest first, drawn ones in any order; −1 fills up, never the first.
        probs: `[N, K]`, of the dtype of the logits; 0 where `ids` is −1.
        tail: `[N]`, the probability of all other classes.
    """

    ids: Tensor
    probs: Tensor
    tail: Tensor


def sparse_target(logits_NV: Tensor, k: int, draws: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Sparse:
    """Keep a part of `p = softmax(z / T)`.

    - `k > 0`, no draws: the k likeliest classes and the mass of the rest, see `top_k`. A divergence on these k + 1 bins is a lower bound
      of the true one.
    - `draws > 0`, no k: random-sampling KD, see `random_draws`. `E p̂ = p`.
    - both: p itself on the k likeliest, and the mass of the rest spread over draws from it, see `top_k_and_draws`. `E p̂ = p`, with less
      variance.

    Args:
        logits_NV: `[N, V]`, float32 or float64; −inf for classes that cannot be.
        k: classes kept with their probability; V or more keeps all.
        draws: n, draws from what is left.
        temperature: T > 0.
        generator: of the draws, on the logits' device; they depend on nothing else but the logits. None is the global one.

    Raises:
        ConfigError: nothing would be kept, or T is not above 0.

    Reference:
        Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv 2503.16870.
    """
    if k < 0 or draws < 0 or k + draws == 0:
        raise ConfigError(f"nothing would be kept of the teacher: k={k} and draws={draws}; take e.g. k=50, or draws=64")
    if temperature <= 0:
        raise ConfigError(f"temperature must be above 0, got {temperature:g}; use 1.0 for none")
    logp = (logits_NV / temperature).log_softmax(-1)
    if draws == 0 or k >= logits_NV.shape[-1]:
        return top_k(logp, k)
    if k == 0:
        return random_draws(logp, draws, generator)
    return top_k_and_draws(logp, k, draws, generator)


def top_k(logp_NV: Tensor, k: int) -> Sparse:
    """The k likeliest classes and the tail `Σ_{v not among them} p_v`, which is summed up, never `1 − Σ_k p_k`, which would round.

    Args:
        logp_NV: `[N, V]`, log-probabilities.
        k: > 0; where it is V or more, the tail is 0.
    """
    top, ids = logp_NV.topk(min(k, logp_NV.shape[-1]), -1)
    return Sparse(ids, top.exp(), _without(logp_NV, ids).logsumexp(-1).exp())


def random_draws(logp_NV: Tensor, draws: int, generator: torch.Generator | None = None) -> Sparse:
    """n draws with replacement from p: `p̂_v = count_v / n`, tail 0. `E p̂ = p`, `Var p̂_v = p_v (1 − p_v) / n`.

    The paper allows to draw from another distribution, `p^t`, and to weigh by the ratio. Here t = 1: the weights are counts, which are
    small integers and sum up to 1 at each position, not only on average.

    Args:
        logp_NV: `[N, V]`, log-probabilities.
        draws: n > 0.
        generator: of the draws.
    """
    drawn = torch.multinomial(logp_NV.exp(), draws, replacement=True, generator=generator)
    ids, counts = _counted(drawn)
    return Sparse(ids, counts.to(logp_NV.dtype) / draws, torch.zeros_like(logp_NV[:, 0]))


def top_k_and_draws(logp_NV: Tensor, k: int, draws: int, generator: torch.Generator | None = None) -> Sparse:
    """The k likeliest classes with p itself; of the rest, whose mass is R, n draws: `p̂_v = R · count_v / n`. Tail 0, `E p̂ = p`.

    `Var p̂_v = p_v (R − p_v) / n` outside of the k likeliest, 0 within: less than `random_draws`. Where R is below 1e-30, nothing is drawn.

    Args:
        logp_NV: `[N, V]`, log-probabilities.
        k: 0 < k < V.
        draws: n > 0.
        generator: of the draws.
    """
    top = top_k(logp_NV, k)
    rest = (_without(logp_NV, top.ids) - top.tail.log()[:, None]).exp()
    nothing = top.tail < NOTHING
    rest = torch.where(nothing[:, None], 1.0, rest)  # multinomial refuses a row without mass; its draws are thrown away
    drawn = torch.multinomial(rest, draws, replacement=True, generator=generator)
    ids, counts = _counted(drawn.masked_fill(nothing[:, None], 0))
    ids = ids.masked_fill(nothing[:, None], -1)
    probs = top.tail[:, None] * (counts.to(logp_NV.dtype) / draws)
    return Sparse(torch.cat([top.ids, ids], -1), torch.cat([top.probs, probs], -1), torch.zeros_like(top.tail))


def _without(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    return logp_NV.scatter(-1, ids_NK, float("-inf"))


def _counted(drawn_Nn: Tensor) -> tuple[Tensor, Tensor]:
    """Different classes of each row with how often each was drawn; −1 and 0 fill up."""
    ordered = drawn_Nn.sort(-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = new.cumsum(-1) - 1
    width = int(slot[:, -1].max()) + 1 if len(slot) else 1
    ids = ordered.new_full((len(ordered), width), -1).scatter_(-1, slot, ordered)
    counts = torch.zeros_like(ids).scatter_add_(-1, slot, torch.ones_like(slot))
    return ids, counts
