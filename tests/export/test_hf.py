"""What is loaded again of a plain folder; what is written is looked at in test_driver.py."""

from pathlib import Path
from typing import Any

import pytest

from distill.export.driver import all_formats
from distill.tasks import CausalLM
from tests.export.sources import llama, source


def test_weights_lie_as_torch_lays_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs the last bit of a product depends on the address, and an export is asked for the student's very bits."""
    loaded, before = [], CausalLM.load

    def load(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        loaded.append(before(self, *args, **kwargs))
        return loaded[0]

    monkeypatch.setattr(CausalLM, "load", load)
    made = all_formats()["hf"]("fp32")
    made.write(source(llama()), tmp_path)
    made.load(tmp_path, CausalLM())
    assert {tensor.data_ptr() % 64 for tensor in (*loaded[0].parameters(), *loaded[0].buffers())} == {0}
