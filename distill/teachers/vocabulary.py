"""Whether a server's tokenizer gives every token the id that the data's gives it, as far as the server lets that be seen."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from pytorch_lightning.utilities import rank_zero_warn

from distill import hub
from distill.teachers.http import Client, Refused
from distill.types import ConfigError

TOKENS, TEXTS = 2048, 16  # tokens that are looked at, over how many texts they are spread


def check_tokens(client: Client, url: str, model: str, tokenizer: Any) -> dict[str, Any]:
    """Compare the tokenizers: token by token where the server tells its vocabulary at `/about`, as ours does; else by what both make of
    texts of 2,048 tokens from all over the data's vocabulary, where it has vLLM's `/tokenize`; else warn.

    Args:
        client: to ask with.
        url: of the server.
        model: by the server's name for it.
        tokenizer: the data's.

    Returns:
        What the server says at `/about`; empty where it says nothing.

    Raises:
        ConfigError: they differ; the message shows the first token that does.
    """
    about = _about(client, url)
    if isinstance(vocabulary := about.get("vocabulary"), dict):
        hub.same_tokens(vocabulary, tokenizer.get_vocab(), "model.teacher", "data.tokenizer")
        return about
    for text in _texts(tokenizer):
        asked = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            theirs = json.loads(client.send("POST", f"{url}/tokenize", json=asked))["tokens"]
        except (Refused, ValueError, KeyError, TypeError):
            rank_zero_warn(
                f"{url} tells neither its vocabulary (/about) nor what it makes of a text (/tokenize): that its tokenizer is the data's "
                "could not be checked"
            )
            return about
        _compare(text, theirs, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    return about


def _about(client: Client, url: str) -> dict[str, Any]:
    try:
        about = json.loads(client.send("GET", f"{url}/about"))
    except (Refused, ValueError):  # vLLM has no such page, and a gateway may have another
        return {}
    return about if isinstance(about, dict) else {}


def _texts(tokenizer: Any) -> Iterator[str]:
    ids = np.unique(list(tokenizer.get_vocab().values()))
    chosen = ids[np.unique(np.linspace(0, len(ids) - 1, TOKENS).astype(int))]
    for part in np.array_split(chosen, TEXTS):
        if text := tokenizer.decode(part.tolist()).strip():
            yield text


def _compare(text: str, theirs: Any, ours: list[int], tokenizer: Any) -> None:
    if theirs == ours:
        return
    if not isinstance(theirs, list):
        raise ConfigError(f"model.teacher.url: /tokenize answers with {str(theirs)[:80]!r}, not with token ids")
    place = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
    shown = [f"{ids[place]}" if place < len(ids) else "none" for ids in (theirs, ours)]
    token = tokenizer.convert_ids_to_tokens(ours[place]) if place < len(ours) else "its end"
    raise ConfigError(
        f"model.teacher and data.tokenizer have different tokenizers: of {text[:40]!r} … token {place} is {shown[0]} / {shown[1]} "
        f"({token!r} for the data); their probabilities cannot be compared: serve a model of the student's family, or set the tokenizer "
        "to the model's"
    )
