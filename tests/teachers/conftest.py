"""A server of the pair's teacher, for the tests of those who ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.teachers.serving import Serve, serving


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start
