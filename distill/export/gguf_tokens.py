"""A tokenizer as llama.cpp knows it: byte-level BPE, cut into words in one of the ways that it has a name for."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.types import ConfigError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        pre: llama.cpp's name of how text is cut into words.
        tokens: by id.
        types: of each token, see `gguf.TokenType`.
        merges: of BPE, in order, `left right`.
        special: ids of `bos`, `eos`, `pad`, `unk`.
        begins: whether every text begins with `bos`.
        chat_template: Jinja, if there is one.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    begins: bool
    chat_template: str | None


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Read a tokenizer of transformers.

    Args:
        tokenizer: with a backend of `tokenizers`.
        size: rows of the embedding; those without a token become unused ones.

    Raises:
        ConfigError: llama.cpp would cut text in another way.
    """
    raw: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE" or raw["normalizer"] is not None:
        normalised = f", normalised by {raw['normalizer']['type']}" if raw["normalizer"] else ""
        raise ConfigError(
            f"format: gguf: the tokenizer is {raw['model']['type']}{normalised}, and only byte-level BPE is known here; take onnx"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, number in raw["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in raw["model"]["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    first = tokenizer("a").input_ids[:1]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    known = {name: number for name, number in special.items() if number is not None}
    return Vocabulary(_pre(raw["pre_tokenizer"]), tokens, types, merges, known, first == [special["bos"]], template)


def _pre(cut: dict[str, Any] | None) -> str:
    parts = [] if cut is None else cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := WORDS.get(parts[0]["pattern"].get("Regex", ""))):
        return name
    raise ConfigError(
        f"format: gguf: the tokenizer cuts text by {' then '.join(kinds) or 'nothing'} in a way that llama.cpp has no name for here; "
        "known are those of GPT-2, SmolLM, Llama 3 and Qwen 2"
    )
