"""Two layers in every runtime: what is timed, what is missing and why."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.advise import blocks
from distill.advise.shapes import on_meta, weights_of
from distill.export import base
from tests.advise.teachers import teacher


def test_small_configs_keep_the_shape_of_a_layer(tmp_path: Path) -> None:
    t = teacher(tmp_path, vocab_size=5000, eos_token_id=4000, pad_token_id=4001)
    small = blocks.small_config(t.config)
    assert (small.num_hidden_layers, small.vocab_size, small.pad_token_id) == (2, 1024, 0)
    assert weights_of(on_meta(t.task, small)).blocks * 2 == t.weights.blocks
    assert (t.config.num_hidden_layers, t.config.vocab_size) == (4, 5000)
    assert blocks.small_config(t.config, 9).num_hidden_layers == 4


def test_layers_are_timed_in_turn_with_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = teacher(tmp_path, hidden_size=128, intermediate_size=2048)
    monkeypatch.setattr(blocks, "EXPORTS", ("torchao:int8",))
    rows: list[Any] = []

    def whole(batch: Any) -> torch.Tensor:
        rows.append(batch["input_ids"].shape)
        end = torch.zeros(())
        for _ in range(40):
            end = end + torch.randn(200, 200).matmul(torch.randn(200, 200)).sum()
        return end

    found, missing = blocks.measure(t.task, t.config, 16, "cpu", whole, rounds=3)
    assert set(found) == {"fp32", "bf16", "90 % zeros", "half the neurons", "torchao:int8", "whole"}
    assert missing == {}
    assert set(rows) == {(1, 16)}
    assert all(ms > 0 for ms in found.values())
    gains = blocks.gains(found)
    assert gains["half the neurons"] == pytest.approx(found["fp32"] / found["half the neurons"])
    assert "fp32" not in gains
    assert "whole" not in gains


def test_what_is_not_installed_is_missing_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(base, "import_module", gone)
    t = teacher(tmp_path, "bert")
    found, missing = blocks.measure(t.task, t.config, 8, "cpu", rounds=2)
    assert set(missing) == set(blocks.EXPORTS)
    assert "needs the package openvino, which is not installed: pip install 'distill[export]'" in missing["openvino:int8"]
    assert {"fp32", "half the neurons"} <= set(found)


def test_large_layers_are_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGEST", 1000)
    t = teacher(tmp_path)
    found, missing = blocks.measure(t.task, t.config, 8, "cpu", rounds=2)
    assert "not exported within a minute" in missing["onnx:int8"]
    assert "bf16" in found


def test_zeros_are_ninety_percent_of_every_linear(tmp_path: Path) -> None:
    model = teacher(tmp_path).task.build(teacher(tmp_path).config)
    zeroed = blocks._with_zeros(model, 0.9)
    weight = zeroed.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    assert not (model.model.layers[0].mlp.up_proj.weight == 0).any()


def test_a_layer_is_half_of_two_and_the_whole_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = teacher(tmp_path)
    monkeypatch.setattr(blocks, "EXPORTS", ())
    monkeypatch.setattr(blocks.cost, "measure", lambda candidates, *_: {name: SimpleNamespace(latency_ms=8.0) for name in candidates})
    found, _ = blocks.measure(t.task, t.config, 8, "cpu", lambda batch: torch.zeros(()))
    assert found == {"fp32": 4.0, "bf16": 4.0, "90 % zeros": 4.0, "half the neurons": 4.0, "whole": 8.0}
