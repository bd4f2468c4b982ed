"""One support for both sides: the classes on which teacher and student are compared, and the positions that count."""

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

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities at temperature T, `log_softmax(z / T)`: `[N, V]`, nats."""
        if temperature not in self._logp:
            self._logp[temperature] = _log_softmax(self.logits_NV, temperature)
        return self._logp[temperature]

    def log_partition(self) -> Tensor:
        """The logarithm of the softmax's denominator, `log Σ_v exp z_v`: `[N]`, nats."""
        return self.logits_NV.logsumexp(-1)


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
