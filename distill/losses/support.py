"""One support for both sides: the classes on which teacher and student are compared."""

from torch import Tensor, float64

from distill.types import ConfigError


def log_probs(logits_NV: Tensor, num_classes: int) -> Tensor:
    """Log-probabilities over the first `num_classes` columns, in float32 (float64 stays).

    A head is often wider than its tokenizer (rows that pad the vocabulary to a multiple of 64 or so), and teacher and student of
    one family differ in that padding. No label and no target lies there: the columns are left out before the softmax, which is the
    same as masking them to −inf, without the NaN that −inf brings into a backward pass.

    Args:
        logits_NV: `[N, V']` with V' ≥ num_classes, of any floating dtype.
        num_classes: V, the number of tokens of the tokenizer, or of labels.

    Returns:
        `[N, V]`, nats.

    Raises:
        ConfigError: the head has fewer columns than there are classes.
    """
    if logits_NV.shape[-1] < num_classes:
        raise ConfigError(
            f"the head predicts {logits_NV.shape[-1]} classes, but the data have {num_classes} (tokens of the tokenizer, or labels); "
            "take a model made for this tokenizer, or one with as many labels"
        )
    logits = logits_NV[..., :num_classes]
    return (logits if logits.dtype == float64 else logits.float()).log_softmax(-1)
