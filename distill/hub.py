"""Loading from a local folder or the Hugging Face hub, with the errors of both said in a sentence."""

import functools
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoTokenizer
from transformers.utils import logging

from distill.types import ConfigError


def load(auto_class: Any, name: str, key: str, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained(name)`.

    Args:
        auto_class: an Auto class of transformers.
        name: a local folder or a hub id.
        key: the key of the configuration that holds `name`, for the message.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        ConfigError: the folder is missing or incomplete, the hub cannot be reached or refuses, or a package is not installed.
    """
    if looks_local(name) and not Path(name).is_dir():
        raise ConfigError(
            f"{key}: no folder '{name}' here; give the path of a model folder (with config.json) or a hub id such as 'org/model'"
        )
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # a bar in a log file is noise
    if not looks_local(name) and not reachable():
        constants.HF_HUB_OFFLINE = True  # what is in the cache still works, and nothing else takes minutes to say so
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{key}: cannot load '{name}': {_reason(name, error)}") from error


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a hub id is `name` or `org/name`, without a leading dot, slash or tilde."""
    return Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1


@functools.cache
def reachable(timeout_s: float = 5.0) -> bool:
    """Whether the hub's server takes a connection. Its own client tries for a minute per file; asked once a process, not behind a proxy."""
    url = urlsplit(constants.ENDPOINT)
    if getproxies().get(url.scheme) and not proxy_bypass(url.hostname or ""):
        return True
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout_s).close()
    except OSError:
        return False
    return True


def _reason(name: str, error: BaseException) -> str:
    if isinstance(error, ImportError):
        return f"a package that it needs is not there; install it, or change the option that asks for it: {_first_line(error)}"
    text = " ".join(str(e) for e in (error, error.__cause__, error.__context__) if e is not None).lower()
    if Path(name).is_dir():
        return f"the folder is there, but not readable as a model: {_first_line(error)}"
    if "gated" in text or "401" in text or "403" in text:
        return "the hub refuses access; accept the licence on the model's page and log in with `hf auth login` (or set HF_TOKEN)"
    if "404" in text or "not a valid model identifier" in text or "repository not found" in text:
        return "the hub has no such model, or it is private; check the name, or log in with `hf auth login`"
    if any(word in text for word in ("connect", "offline", "resolve", "network", "timed out", "couldn't reach", "cached")):
        return "the hub cannot be reached; connect to a network, or download the model first and give its folder"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_tokenizer(name: str, key: str, revision: str | None, tokenizer: Any) -> None:
    """Make sure that the tokenizer in a model's folder gives every token the id that the data's gives it.

    Args:
        name: the model's folder or hub id.
        key: the key of the configuration that holds `name`, e.g. `model.teacher.model`.
        revision: of the hub id.
        tokenizer: the data's.

    Raises:
        ConfigError: there is none, or they differ (see `same_tokens`).
    """
    place = str(Path(name).resolve()) if Path(name).is_dir() else name  # another working directory is another folder
    same_tokens(_vocabulary(place, key, revision), tokenizer.get_vocab(), key.rpartition(".")[0], "data.tokenizer")


@functools.lru_cache(maxsize=2)  # a teacher's and a student's
def _vocabulary(name: str, key: str, revision: str | None) -> dict[str, int]:
    vocabulary: dict[str, int] = load(AutoTokenizer, name, key, revision=revision).get_vocab()
    return vocabulary


def same_tokens(theirs: dict[str, int], ours: dict[str, int], who: str, other: str) -> None:
    """Make sure that two tokenizers give every token the same id.

    Args:
        theirs: token to id, of the model `who`.
        ours: token to id, of the data.
        who: key of the model, for the message.
        other: key of the data's tokenizer, for the message.

    Raises:
        ConfigError: they differ; the message shows the first tokens that do.
    """
    if theirs == ours:
        return
    differ = sorted(t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
    shown = ", ".join(f"{t!r}: {theirs.get(t, 'none')} / {ours.get(t, 'none')}" for t in differ[:3])
    raise ConfigError(
        f"{who} and {other} have different tokenizers ({len(theirs)} / {len(ours)} tokens, {len(differ)} with another id, e.g. {shown}); "
        "their logits cannot be compared: take models of one family, or set the tokenizer to the model's"
    )


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values: itself, or the integers, scales and zero points of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in stored(getattr(tensor, name))]


def describe(model: Any) -> dict[str, Any]:
    """Count a model: parameters, trainable parameters, megabytes (10^6 bytes) in memory, dtype."""
    params = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in params),
        "trainable": sum(p.numel() for p in params if p.requires_grad),
        "megabytes": sum(t.numel() * t.element_size() for p in params for t in stored(p)) / 1e6,
        "dtype": str(next(iter(params)).dtype).removeprefix("torch."),
    }
