"""Tiny random models and tokenizers, made in milliseconds and saved where a test wants them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 40
LABELS = ("negative", "neutral", "positive")
_SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_SMALL, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
_ENCODER = {**_SMALL, "max_position_embeddings": 32}
# BERT's ids of special tokens fit a vocabulary of 40 as they are; DistilBERT has names of its own
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "gemma2": {**_DECODER, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "granite": {**_DECODER, "logits_scaling": 4.0},
    "cohere": {**_DECODER, "logit_scale": 0.25},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1},
    "opt": {**_ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "bert": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 8},
    "roberta": {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "distilbert": {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
}


def causal_lm(model_type: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make a causal language model whose logits are of order 1, so that a transform of them shows."""
    return _loud(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes)), seed)


def classifier(model_type: str = "bert", seed: int = 0, labels: tuple[str, ...] = LABELS, **changes: Any) -> PreTrainedModel:
    """Make a sequence classifier with these labels."""
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | expected_labels(labels) | changes)
    return _loud(AutoModelForSequenceClassification.from_config(config), seed)


def expected_labels(labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    """Say what a classifier's config must hold for these labels."""
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def tokenizer(size: int = VOCAB, first: str = "w") -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer of `size` tokens: [PAD], [EOS], [UNK], w3, w4, …"""
    words = ["[PAD]", "[EOS]", "[UNK]", *(f"{first}{i}" for i in range(3, size))]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def save(model: PreTrainedModel, folder: Path, words: PreTrainedTokenizerFast | None = None) -> str:
    """Write model and tokenizer as a folder of transformers; give its path."""
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return str(folder)


def tokens(batch: int = 2, length: int = 6) -> torch.Tensor:
    """Draw ids of ordinary words, `[B, T]`."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def _loud(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=rng) / 2)
    return model.eval()
