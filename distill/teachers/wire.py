"""How a batch travels to a teacher in another process and its outputs back: safetensors in the body of a request."""

import os
from collections.abc import Iterable

import torch
from safetensors.torch import load, save
from torch import Tensor

from distill.types import Batch, ConfigError

INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")  # what models read; labels stay at home
TAP = "tap:"
WEIGHTS = "X-Distill-Weights"  # header of a request: the digest of the model that the student's side holds the head of
KEY = "DISTILL_SERVE_KEY"  # of the environment: whoever asks must send it


def key() -> str | None:
    """The key in the environment, without white space around it; None where there is none.

    Raises:
        ConfigError: it has characters that cannot be in a header.
    """
    found = os.environ.get(KEY, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise ConfigError(f"the key in {KEY} has characters that no HTTP header can hold; set it anew")
    return found or None


def pack_batch(batch: Batch) -> bytes:
    """Serialise what a model reads of a batch."""
    return _save({name: batch[name] for name in INPUTS if name in batch})


def unpack_batch(body: bytes) -> dict[str, Tensor]:
    """Read it again.

    Raises:
        ValueError: the body is no batch.
    """
    try:
        batch = load(body)
    except Exception as error:  # safetensors has its own error, of no public base
        raise ValueError(f"the body is not safetensors: {error}") from error
    if "input_ids" not in batch or any(name not in INPUTS for name in batch):
        raise ValueError(f"a batch holds input_ids and may hold {', '.join(INPUTS[1:])}; got {', '.join(batch) or 'nothing'}")
    return batch


def pack_outputs(features: Tensor, taps: dict[str, Tensor]) -> bytes:
    """Serialise features and taps, in their dtype."""
    tensors = {"features": features} | {TAP + name: value for name, value in taps.items()}
    return _save(tensors)


def unpack_outputs(body: bytes, taps: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Read them again."""
    tensors = load(body)
    return tensors["features"], {name: tensors[TAP + name] for name in taps}


def _save(tensors: dict[str, Tensor]) -> bytes:
    # clones, for safetensors refuses two names for one memory, and a tap may be the features themselves
    return save({name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})
