"""The benches of exports run, and say what they measured."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module(request.param)
    sys.modules.pop(request.param)


@pytest.mark.parametrize("bench", ["packed"], indirect=True)
def test_packed(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zstandard", reason="packing needs zstandard")
    pytest.importorskip("torchao", reason="integers are torchao's")
    save_file({"a": torch.randn(64, 96), "b": torch.randn(5)}, tmp_path / "w")
    bench.main([str(tmp_path / "w"), "--coders", "zstd"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    assert all(line.count("|") == 8 for line in lines)


@pytest.mark.parametrize("bench", ["int8"], indirect=True)
def test_int8(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao", reason="what is timed is of torchao here, which is traced in no time")
    small = ["--layers", "1", "--width", "64", "--length", "8", "--v", "32", "--batches", "1", "2", "--turns", "3", "--calibration", "2"]
    bench.main([*small, "--formats", "torchao:int8"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 1", "| 2", "| 2"]
    assert lines[2].split(" | ")[3] == "1.00", "the student beside itself"
    assert float(lines[3].split(" | ")[3]) > 0
