"""Which bytes each token of a vocabulary stands for: what two tokenizers have in common."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill.types import ConfigError

PROBE = "One, two: 3 + 4!"


@dataclass(frozen=True)
class Spelling:
    """The bytes of every token.

    Attributes:
        tokens: by id, the bytes; empty where there is no such id.
        lengths: `[V]`, int64, of those.
        special: `[V]`, tokens that are no text: bos, eos, padding, marks of a chat; ids that there are not.
        leads: whether the tokenizer puts a space before a text that does not begin with one.
        bos: the token that it begins every text with, by itself; None for none.
        pad: a token to fill rows with.
    """

    tokens: list[bytes]
    lengths: NDArray[np.int64]
    special: NDArray[np.bool_]
    leads: bool
    bos: int | None
    pad: int

    def of(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text in tokens."""
        return b"".join(map(self.tokens.__getitem__, ids))


def spelling(tokenizer: Any, key: str) -> Spelling:
    """Look up the bytes of every token.

    Known are byte-level BPE, where a character stands for a byte, and the family of SentencePiece, where `▁` stands for a space and
    `<0x0A>` for a byte. Added tokens stand for their own text.

    Args:
        tokenizer: of transformers.
        key: of the configuration, for messages.

    Raises:
        ConfigError: it is of another kind, or does not keep even a plain text as it is, e.g. lower-cases it.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    kinds = _decoders(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    by_byte = {ord(char): byte for byte, char in bytes_to_unicode().items()} if any(d["type"] == "ByteLevel" for d in kinds) else None
    space = next((mark for d in kinds if (mark := _space(d))), None)
    if by_byte is None and space is None:
        raise ConfigError(
            f"{key}: which bytes its tokens stand for is known for byte-level BPE and SentencePiece alone, and {type(tokenizer).__name__} "
            "is neither; take another tokenizer, or a teacher with the student's"
        )
    with_bytes = any(d["type"] == "ByteFallback" for d in kinds)
    added = backend.get_added_tokens_decoder()
    vocabulary = {**backend.get_vocab(with_added_tokens=False), **{token.content: i for i, token in added.items()}}
    tokens, special = [b""] * (max(vocabulary.values()) + 1), np.ones(max(vocabulary.values()) + 1, np.bool_)
    for token, i in vocabulary.items():
        special[i] = False
        if i in added:
            tokens[i] = token.encode()
        else:
            tokens[i] = _byte_level(token, by_byte) if by_byte is not None else _sentence_piece(token, str(space), with_bytes)
    special[[i for i, token in added.items() if token.special] + tokenizer.all_special_ids] = True
    found = Spelling(tokens, np.array([len(t) for t in tokens], np.int64), special, False, bos(tokenizer), padding(tokenizer))
    spelled = found.of(backend.encode(PROBE, add_special_tokens=False).ids)
    if spelled not in (PROBE.encode(), b" " + PROBE.encode()):
        raise ConfigError(
            f"{key}: the tokens of {PROBE!r} spell {spelled.decode(errors='replace')!r}, so texts cannot be told from tokens; take a "
            "tokenizer that keeps texts as they are"
        )
    return Spelling(tokens, found.lengths, special, len(spelled) > len(PROBE), found.bos, found.pad)


def bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, if the tokenizer adds one by itself."""
    begin: int | None = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else None


def padding(tokenizer: Any) -> int:
    """A token to fill rows with, which no valid position sees."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _decoders(state: dict[str, Any]) -> list[dict[str, Any]]:
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _space(decoder: dict[str, Any]) -> str | None:
    """What stands for a space, where this part of a decoder says so."""
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"])
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return str(decoder["pattern"].get("String", "")) or None
    return None


def _byte_level(token: str, by_byte: dict[int, int]) -> bytes:
    try:
        return token.translate(by_byte).encode("latin-1")
    except UnicodeEncodeError:  # not in the alphabet of bytes: it stands for itself
        return token.encode()


def _sentence_piece(token: str, space: str, with_bytes: bool) -> bytes:
    if with_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(space, " ").encode()
