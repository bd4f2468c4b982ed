"""What every test needs: no network, caches of its own."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")


RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_ranks_left_behind() -> Iterator[None]:
    """Take out of the environment what Lightning leaves there after several ranks: the next run would wait for them."""
    yield
    for name in RANKS:
        os.environ.pop(name, None)
