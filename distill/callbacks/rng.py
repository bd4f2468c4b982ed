"""The states of the random number generators of all ranks, as plain values that the safe loader of torch takes."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed


def state() -> dict[str, Any]:
    """The states in this process: of Python, NumPy, torch on the CPU, and torch on the current GPU where there is one."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore(states: dict[str, Any]) -> None:
    """Set the generators of this process to what `state` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    cuda: Tensor | None = states.get("cuda")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def gather(states: dict[str, Any]) -> list[dict[str, Any]]:
    """Collect the states of all ranks, in their order; all must call."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [states]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, states)
    return gathered
