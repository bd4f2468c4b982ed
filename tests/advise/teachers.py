"""Teachers for tests: folders with a configuration and no weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from distill.advise.forms import Forms, Measured
from distill.advise.model import Teacher, read
from distill.advise.parts import Figure, Loss

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
}
BERT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "architectures": ["BertForSequenceClassification"],
}
# made-up milliseconds of a layer
TIMES = {
    "fp32": 2.0,
    "half the neurons": 1.5,
    "bf16": 4.0,
    "90 % zeros": 2.0,
    "openvino:fp32": 1.6,
    "openvino:int8": 0.5,
    "onnx:int8": 1.0,
    "onnx:int4": 1.2,
    "torchao:int8-dynamic": 2.2,
    "torchao:int8": 2.1,
    "torchao:int4": 3.0,
}


def folder(place: Path, kind: str = "llama", **changes: Any) -> str:
    """Write a configuration."""
    AutoConfig.for_model(kind, **(LLAMA if kind == "llama" else BERT) | changes).save_pretrained(place)
    return str(place)


def teacher(place: Path, kind: str = "llama", **changes: Any) -> Teacher:
    """Read it."""
    return read(folder(place, kind, **changes), None)


def forms(place: Path, kind: str = "llama", tokens: int | None = None, losses: dict[str, Loss] | None = None, **changes: Any) -> Forms:
    """All forms of it: 10 ms, of which 8 in layers; 10^9 operations a second."""
    measured = Measured(10.0, TIMES, Figure(1e9, True, "made up"), losses or {}, 32)
    return Forms(teacher(place, kind, **changes), measured, tokens)


def llama() -> PreTrainedModel:
    """With weights."""
    return LlamaForCausalLM(AutoConfig.for_model("llama", **LLAMA)).eval()
