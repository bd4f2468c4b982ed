"""What every test needs: no network, caches of its own."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

from distill import command  # after these: it imports what reads them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that none is left over for one process at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the report at the end of a run to the tests that are about it: it takes longer than their training."""
    monkeypatch.setattr(command, "REPORT_ROWS", 0)


RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_ranks_left_behind() -> Iterator[None]:
    """Take out of the environment what Lightning leaves there after several ranks: the next run would wait for them."""
    yield
    for name in RANKS:
        os.environ.pop(name, None)
