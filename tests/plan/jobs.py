"""Jobs for tests: the Llama pair of the shipped config, and small ones."""

from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from distill.plan import models
from distill.plan.job import Job, Shape
from distill.students.load import FromConfig
from distill.tasks import CausalLM

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def shape(config: dict[str, Any]) -> Shape:
    """A model of which everything is trained."""
    return models.shape_of(models.on_meta(CausalLM(), AutoConfig.for_model(**config), None, FromConfig({})), "model.student")


def trained(parameters: int) -> Shape:
    """A student of which nothing but the number of its parameters matters."""
    return Shape(parameters, parameters, 0, 0, False, False, 0, 0, 0, 0, 0, 0, 0, False)


def job(student: Shape, **changes: Any) -> Job:
    plain = Job(student, None, 1, 1, 1, "bf16-mixed", False, 2, "token", 16, 16, 16, 1)
    return replace(plain, **changes)
