from pathlib import Path

import pytest

from tests import pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher and the prompts of the tiny pair, for all tests of a file."""
    folder = tmp_path_factory.mktemp("pair")
    pair.data(folder, batch_size=4)
    return folder
