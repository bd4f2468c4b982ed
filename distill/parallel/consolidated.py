"""A checkpoint that is a folder, read in one process: no GPU, no process group, whatever ranks have written it."""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from distill.parallel import fsdp, universal
from distill.parallel.folder import NAME, Parts
from distill.parallel.zero import check_installed
from distill.types import ConfigError

WEIGHTS = "state_dict."  # what the names of the module's tensors begin with in a folder of FSDP2


def read(path: Path) -> dict[str, Any]:
    """Give a checkpoint as one process would have saved it, but for the optimizer: `state_dict` holds every tensor whole.

    Of ZeRO it is the float32 weights that the optimizer keeps; for these all of the optimizer's state goes through the memory of this
    machine, 12 bytes a weight and more. Of FSDP2 nothing but the weights is read.

    Args:
        path: a folder, proven to be whole.

    Raises:
        ConfigError: it is not one of ours, or DeepSpeed has written it and is not here.
    """
    if not (path / NAME).is_file():
        raise ConfigError(f"cannot read the checkpoint '{path}': it has no {NAME}, so it is not one of ours")
    if Parts(**json.loads((path / NAME).read_text(encoding="utf-8"))).kind == fsdp.KIND:
        rest = torch.load(path / fsdp.REST, map_location="cpu")
        return {**rest, "state_dict": _of_fsdp(path)}
    check_installed()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and a diary
        weights = universal.weights(path)
    return universal.client_state(path) | {"state_dict": weights}


def _of_fsdp(path: Path) -> dict[str, Tensor]:
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: each for name, each in found.items() if name.startswith(WEIGHTS) and isinstance(each, TensorStorageMetadata)}
    weights = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        load(weights, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(WEIGHTS): weight for name, weight in weights.items()}
