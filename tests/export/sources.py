"""Tiny students to export, with weights large enough for their logits to differ from row to row."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distill.compress.factors import label, put_factors
from distill.compress.ptq import ptq
from distill.export.base import Source
from distill.export.grid import Grid, grids_of
from distill.export.torchao import carry
from distill.tasks import CausalLM, SequenceClassification
from distill.types import Batch

VOCAB = 300
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def byte_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 278 tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=278, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["the cat sat on the mat and that was that"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")


def llama(**changes: Any) -> PreTrainedModel:
    """Two layers, grouped-query attention."""
    torch.manual_seed(0)
    kwargs = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": None}
    return _louder(LlamaForCausalLM(LlamaConfig(**{**kwargs, "eos_token_id": 0, "pad_token_id": 1, **changes})))


def low_rank(**changes: Any) -> PreTrainedModel:
    """The Llama with one layer of two factors."""
    model = llama(**changes)
    put_factors(model, {"model.layers.0.mlp.up_proj": 4})
    label(model)
    return model.eval().requires_grad_(False)


def bert(**changes: Any) -> PreTrainedModel:
    """Two layers, three classes."""
    torch.manual_seed(0)
    return _louder(BertForSequenceClassification(BertConfig(**{**SIZES, "max_position_embeddings": 64, "num_labels": 3, **changes})))


def _louder(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return model.eval().requires_grad_(False)


def batches() -> Iterable[Batch]:
    """Two batches of two lengths, one with padding."""
    rng = torch.Generator().manual_seed(0)
    for length in (7, 5):
        ids = torch.randint(2, 278, (3, length), generator=rng)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


def as_torchao(model: Any) -> Any:
    """The weights of a saved student as torchao's integers, in place, as the export stores them."""
    for name, grid in grids_of(model).items():
        carry(model.get_submodule(name), grid)
    return model


def source(model: PreTrainedModel, grids: dict[str, Grid] | None = None) -> Source:
    """The source that the verb would make of it."""
    task = CausalLM() if isinstance(model, LlamaForCausalLM) else SequenceClassification()
    return Source(model, byte_bpe(), task, batches, grids_of(model) if grids is None else grids)


def mixed(**changes: Any) -> Source:
    """A Llama whose attention is on a grid of 8 bits with a scale a row, and whose FFN on one of 4 bits in groups of 32."""
    attention = ptq(llama(**changes), "int8", include=["*self_attn*"])
    both = ptq(attention, "int4", include=["*mlp*"])
    return source(both, grids_of(attention) | grids_of(both))
