from pathlib import Path

import pytest
import torch

from distill import checkpoints
from distill.parallel import folder as folders
from distill.parallel.fsdp import FSDP2, blocks
from distill.types import ConfigError
from tests import pair
from tests.models import causal_lm


def test_the_blocks_are_the_models_own() -> None:
    model = causal_lm(num_hidden_layers=3)
    assert blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), model)) == list(model.model.layers)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.name_of(1)
    with folders.published(pair.trainer().strategy, path, folders.Parts("ZeRO-2", 2, [])) as here:
        (here / "x.pt").write_bytes(b"1")
    strategy = FSDP2()
    strategy.model = torch.nn.Linear(1, 1)
    strategy.broadcast = lambda value, src=0: value  # type: ignore[method-assign]
    strategy._data_parallel_size = strategy._tensor_parallel_size = 1
    with pytest.raises(ConfigError, match=r"is of ZeRO-2, not of FSDP2; resume with the trainer\.strategy that wrote it"):
        strategy.load_checkpoint(path)
