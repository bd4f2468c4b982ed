"""One support for both sides: the classes on which teacher and student are compared, and the positions that count."""

import copy
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, float64

from distill.types import IGNORE_INDEX, Batch, ConfigError

FLOOR = -1e5


class Distribution:
    """Distributions over V classes at N positions, known by logits; what is asked for twice is computed once.

    Args:
        logits_NV: `[N, V]`, float32 or float64, up to a constant per position.
    """

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV
        self._logp: dict[float, Tensor] = {}
        self._probs: dict[float, Tensor] = {}

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities at temperature T, `log_softmax(z / T)`: `[N, V]`, nats."""
        if temperature not in self._logp:
            self._logp[temperature] = _log_softmax(self.logits_NV, temperature)
        return self._logp[temperature]

    def probs(self, temperature: float = 1.0) -> Tensor:
        """Probabilities at temperature T, `softmax(z / T)`: `[N, V]`."""
        if temperature not in self._probs:
            self._probs[temperature] = self.logp(temperature).exp()
        return self._probs[temperature]

    def align(self, student: "Distribution") -> "Distribution":
        """Give the student's distribution on the support of this one: the same classes."""
        return student

    def spread(self, gradient: Tensor, temperature: float) -> Tensor:
        """Give a gradient with respect to what `logp(T)` is the log-softmax of as one with respect to the logits divided by T: the same."""
        return gradient

    def log_partition(self) -> Tensor:
        """The logarithm of the softmax's denominator, `log Σ_v exp z_v`: `[N]`, nats."""
        return self.logits_NV.logsumexp(-1)


class Known:
    """A teacher's distribution of which K classes are known and the mass of all others, the tail: K + 1 bins.

    Args:
        ids_NK: `[N, K]`, classes; −1 where a position has fewer.
        probs_NK: `[N, K]`, their probabilities.
        tail_N: `[N]`, the probability of the others; `Σ_k probs + tail = 1`.
        temperature: T of the softmax that they come from.
        no_tail: whether `tail_N` is known to be 0 everywhere, as it is with random draws.

    Attributes:
        fills: `[N, K]`, where `ids` is −1.
        filled_ids: `[N, K]`, the position's first class there.
    """

    def __init__(self, ids_NK: Tensor, probs_NK: Tensor, tail_N: Tensor, temperature: float, no_tail: bool = False) -> None:
        self.ids, self.fills, self.temperature, self.no_tail = ids_NK, ids_NK < 0, temperature, no_tail
        self.filled_ids = torch.where(self.fills, ids_NK[:, :1], ids_NK)
        self.probs = torch.cat([probs_NK, tail_N[:, None]], -1)
        self._logp = self.probs.log().clamp(min=FLOOR)

    def __getitem__(self, rows: slice) -> "Known":
        """Some of the positions; what was computed is not computed again."""
        part = copy.copy(self)
        for name in ("ids", "fills", "filled_ids", "probs", "_logp"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the bins, `[N, K + 1]` in nats, the tail last.

        Raises:
            ConfigError: another T than the one that they were made with.
        """
        if temperature != self.temperature:
            raise ConfigError(
                f"a term has temperature={temperature:g}, but the target was made with {self.temperature:g}, and cannot be softened "
                "after; take the same, or make the target anew"
            )
        return self._logp

    def align(self, student: Distribution) -> "Binned":
        """Give the student's distribution on the same bins."""
        return Binned(student, self.filled_ids, self.fills)

    def dense(self, num_classes: int) -> Tensor:
        """Probabilities of all classes, `[N, V]`, where nothing is left for the tail."""
        known = torch.zeros(len(self.ids), num_classes, dtype=self.probs.dtype, device=self.probs.device)
        return known.scatter_add_(-1, self.ids.clamp(min=0), self.probs[:, :-1])


class Binned(Distribution):
    """A student's distribution on K classes and the tail of all others. `q_tail` is summed up, never `1 − Σ q_k`, which would round.

    Args:
        student: on all classes.
        ids_NK: `[N, K]`, the classes.
        fills_NK: `[N, K]`, where a position has fewer, and its first class stands again.
    """

    def __init__(self, student: Distribution, ids_NK: Tensor, fills_NK: Tensor) -> None:
        super().__init__(student.logits_NV)
        self.ids, self.fills = ids_NK, fills_NK
        self._rest: dict[float, tuple[Tensor, Tensor]] = {}

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the bins, `[N, K + 1]` in nats, the tail last."""
        if temperature not in self._logp:
            scaled = self.logits_NV if temperature == 1.0 else self.logits_NV / temperature
            floor = 2 * FLOOR / min(temperature, 1.0)  # far below every class, one that is ruled out as well
            rest = scaled.scatter(-1, self.ids, floor)
            tail = rest.logsumexp(-1, keepdim=True)
            known = scaled.gather(-1, self.ids).masked_fill(self.fills, floor)
            self._logp[temperature] = torch.cat([known, tail], -1).log_softmax(-1)
            self._rest[temperature] = rest.detach(), tail.detach()
        return self._logp[temperature]

    def spread(self, gradient: Tensor, temperature: float) -> Tensor:
        """Give a gradient with respect to the bins' logits as one with respect to all logits divided by T.

        The tail's goes to its classes in proportion to their probabilities: `b_tail q_v / q_tail`.
        """
        self.logp(temperature)
        rest, tail = self._rest[temperature]
        flow = (rest - tail).exp_().mul_(gradient[:, -1:])
        known = gradient[:, :-1]
        return flow.scatter_(-1, self.ids, torch.where(self.fills, known[:, :1], known))


class Mixture(Distribution):
    """The mean of several distributions on the same classes, each position with its own weights.

    `Σ_m w_m p_m` at every temperature, or with `geometric` `p ∝ exp Σ_m w_m log p_m`.

    Args:
        parts: M distributions; those known by draws alone stand for their estimate.
        weights_NM: `[N, M]`, w, with sum 1.
        num_classes: V.
        geometric: whether the logarithms are averaged.
    """

    def __init__(self, parts: Sequence[Distribution | Known], weights_NM: Tensor, num_classes: int, geometric: bool) -> None:
        self.parts, self.weights, self.num_classes, self.geometric = parts, weights_NM, num_classes, geometric
        self._logp: dict[float, Tensor] = {}
        self._probs: dict[float, Tensor] = {}

    @property
    def logits_NV(self) -> Tensor:  # type: ignore[override]  # noqa: N802  # known when asked for
        """Log-probabilities at T = 1: logits of the mean."""
        return self.logp()

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the mean of the softened distributions: `[N, V]`, nats."""
        if temperature not in self._logp:
            mean = self._geometric(temperature) if self.geometric else self._arithmetic(temperature)
            self._logp[temperature] = mean.clamp(min=FLOOR)
        return self._logp[temperature]

    def _arithmetic(self, temperature: float) -> Tensor:
        weighed = zip(self.parts, self.weights.log().unbind(-1), strict=True)
        return reduce(torch.logaddexp, (self._log_of(part, temperature) + w[:, None] for part, w in weighed))  # exp would underflow

    def _geometric(self, temperature: float) -> Tensor:
        weighed = zip(self.parts, self.weights.unbind(-1), strict=True)
        return sum((part.logp(temperature) * w[:, None] for part, w in weighed), torch.zeros(())).log_softmax(-1)

    def _log_of(self, part: Distribution | Known, temperature: float) -> Tensor:
        logp = part.logp(temperature)
        return part.dense(self.num_classes).log() if isinstance(part, Known) else logp


class Apart:
    """Several teachers that a term is evaluated against one by one: `Σ_m w_m L(p_m, q)`.

    Where one weight is 1 and the others 0, the choice of a teacher. For a term that is linear in the teacher's probabilities (forward KL,
    up to a constant) the gradient of the term on their mean.

    Args:
        parts: M distributions, each on its own support.
        weights_NM: `[N, M]`, w.
    """

    def __init__(self, parts: "Sequence[Distribution | Known]", weights_NM: Tensor) -> None:
        self.parts, self.weights = parts, weights_NM


Side = Distribution | Known | Apart
"""A teacher, as terms see it."""


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return logits_NV.log_softmax(-1)
    scaled = logits_NV / temperature
    if scaled.requires_grad:
        return scaled.log_softmax(-1)
    return torch.log_softmax(scaled, -1, out=scaled)  # in place: one tensor less for the cache to hold


def cut(logits_NV: Tensor, num_classes: int) -> Tensor:
    """The first `num_classes` columns, in float32 (float64 stays).

    A head is often wider than its tokenizer (rows that pad the vocabulary to a multiple of 64 or so), and teacher and student of
    one family differ in that padding. No label and no target lies there: the columns are left out before the softmax, which is the
    same as masking them to −inf, without the NaN that −inf brings into a backward pass.

    A logit of −inf (a class that a model rules out) becomes `FLOOR`: its probability is 0 all the same, and `0 · (−inf)` appears nowhere.

    Args:
        logits_NV: `[N, V']` with V' ≥ num_classes, of any floating dtype.
        num_classes: V, the number of tokens of the tokenizer, or of labels.

    Returns:
        `[N, V]`, at least `FLOOR`.

    Raises:
        ConfigError: the head has fewer columns than there are classes.
    """
    if logits_NV.shape[-1] < num_classes:
        raise ConfigError(
            f"the head predicts {logits_NV.shape[-1]} classes, but the data have {num_classes} (tokens of the tokenizer, or labels); "
            "take a model made for this tokenizer, or one with as many labels"
        )
    logits = logits_NV[..., :num_classes]
    return (logits if logits.dtype == float64 else logits.float()).clamp(min=FLOOR)


def log_probs(logits_NV: Tensor, num_classes: int) -> Tensor:
    """Log-probabilities over the first `num_classes` columns, `[N, V]` in nats; see `cut`."""
    return cut(logits_NV, num_classes).log_softmax(-1)


def position_weights(batch: Batch, length: int) -> Tensor:
    """How much each position of an intermediate activation counts in a sum over valid positions.

    Where labels belong to positions, 1 at every valid one. Where a sample has one label, its real positions share a weight of 1, so that
    long texts do not outweigh short ones. Padding, prompts and samples without a label weigh 0.

    Args:
        batch: with `labels` `[B, T]`, or `[B, 1]` and `attention_mask` `[B, T]` (none where nothing is padded).
        length: T, positions of the activation.

    Returns:
        `[B, T]`, float32, with as large a sum as there are valid labels.
    """
    valid = (batch["labels"] != IGNORE_INDEX).float()
    if valid.shape[1] == length:
        return valid
    real = batch["attention_mask"].float() if "attention_mask" in batch else torch.ones(len(valid), length, device=valid.device)
    return valid * real / real.sum(1, keepdim=True).clamp(min=1)
