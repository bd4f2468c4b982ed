"""Small and real tokenizers of both kinds whose tokens stand for bytes."""

import functools
import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.data.embedded import train_tokenizer
from distill.data.packing import Document
from tests.data.helpers import SHARED

CORPUS = [
    "the cat sat on the mat, and then the cat ran to the other mat. ",
    "naïve café, déjà vu: the naïve cat sat in the café. ",
    "こんにちは世界。世界の猫。 the 猫 sat. ",
    "one  two   three\n\n\tfour 🙂 🙂 👩‍🚀 five 12 123 1234\n",
] * 4
MARK = "<|turn|>"


@functools.cache
def byte_bpe(size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE; no bos."""
    return train_tokenizer(CORPUS, size)


def chat(size: int = 300) -> PreTrainedTokenizerFast:
    """The same with a mark of a chat."""
    tokenizer = train_tokenizer(CORPUS, size)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    return tokenizer


@functools.cache
def sentence_piece(size: int = 120, bos: bool = True) -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: `▁` for a space, one before every text, and bytes for what it does not know."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, limit_alphabet=30, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    ids = {name: i for i, name in enumerate(names)}
    return _llama(ids, [tuple(pair) for pair in model["merges"]], bos)


@functools.cache
def stories() -> PreTrainedTokenizerFast:
    """The tokenizer of stories260K, from llama2.c's file: a piece's rank is its score."""
    data, pieces, at = (SHARED / "stories260K/tok512.bin").read_bytes(), [], 4
    while at < len(data):
        score, size = struct.unpack("fi", data[at : at + 8])
        pieces.append((score, data[at + 8 : at + 8 + size].decode()))
        at += 8 + size
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(piece.replace(" ", "▁") for _, piece in pieces[259:])]
    ids = {name: i for i, name in enumerate(names)}
    splits = [(n[:k], n[k:]) for n in names[259:] for k in range(1, len(n)) if n[:k] in ids and n[k:] in ids]
    return _llama(ids, sorted(splits, key=lambda pair: ids[pair[0] + pair[1]]), bos=True)


@functools.cache
def gpt2() -> GPT2Tokenizer:
    """The published one."""
    folder = SHARED / "gpt2_tokenizer"
    return GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))


def has(*folders: str) -> bool:
    """Whether the shared data are here."""
    return all((SHARED / folder).exists() for folder in folders)


def _llama(ids: dict[str, int], merges: list[tuple[str, str]], bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def document(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str = "") -> Document:
    """A document as the data make it: what the tokenizer adds before, the prompt, the text, eos."""
    before = tokenizer("")["input_ids"]
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (prompt, text)]
    ids = np.array([*before, *parts[0], *parts[1], tokenizer.eos_token_id], np.int32)
    return Document(ids, np.arange(len(ids)) >= len(before) + len(parts[0]))


def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write it, and give the folder."""
    tokenizer.save_pretrained(folder)
    return str(folder)
