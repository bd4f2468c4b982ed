"""A teacher with 8-bit weights, through torchao: a quarter of float32's memory, half of bfloat16's."""

from torch import nn
from transformers import PreTrainedModel

from distill.types import ConfigError


def quantise(model: PreTrainedModel) -> None:
    """Store the weights of every linear but the head as 8-bit integers with one scale per output row; in place.

    `W ≈ s · round(W / s)` with `s = max|W_row| / 127.5`. Products are computed in the model's dtype. The head is left as it is: its error
    would be the target's, and under chunking it is small beside the logits.

    Args:
        model: frozen.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ConfigError("model.teacher.quantize needs torchao, which is not installed: pip install 'torchao>=0.18'") from None
    head = model.get_output_embeddings()
    quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head)
