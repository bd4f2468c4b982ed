"""Counts by hand, and clocks on work whose length is known."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.report.costs import cost, energy
from distill.teachers.quantise import quantise
from tests import models

ONE, MANY = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, {"input_ids": torch.zeros(8, 4, dtype=torch.long)}


def sleeps(seconds: float) -> cost.Candidate:
    def run(batch: Any) -> Tensor:
        time.sleep(seconds * len(batch["input_ids"]))
        return torch.empty(0)

    return cost.Candidate(run)


def test_clocks() -> None:
    found = cost.measure({"fast": sleeps(0.01), "slow": sleeps(0.04)}, ONE, MANY, rounds=4, warm_up=1)
    for name, seconds in (("fast", 0.01), ("slow", 0.04)):
        assert 1e3 * seconds <= found[name].latency_ms <= 1e3 * seconds + 50
        assert found[name].latency_p95_ms >= found[name].latency_ms
        assert 1 / (seconds + 0.05) <= found[name].throughput <= 1 / seconds
        assert found[name].cpu_ms < found[name].latency_ms
    assert found["fast"].parameters is None


def test_counts_by_hand(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight[:8] = 0
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    run = lambda batch: model(torch.ones(len(batch["input_ids"]), 4, 16))
    (found,) = cost.measure({"m": cost.Candidate(run, model, tmp_path)}, ONE, MANY, rounds=2, warm_up=0).values()
    assert found.parameters == 16 * 32 + 32 * 4 + 4
    assert found.nonzero == found.parameters - 8 * 16
    assert found.disk_bytes == 100
    assert found.flops == 2 * 4 * (16 * 32 + 32 * 4)  # four positions
    assert found.as_dict()["flops"] == found.flops


def test_memory_of_a_run() -> None:
    def takes(megabytes: int) -> cost.Candidate:
        def run(batch: Any) -> Tensor:
            held = torch.ones(megabytes * 250_000 * len(batch["input_ids"]) // 8)
            time.sleep(0.05)
            return held

        return cost.Candidate(run)

    found = cost.measure({"little": takes(1), "much": takes(200)}, ONE, MANY, rounds=2, warm_up=1)
    assert 150e6 < found["much"].peak_bytes < 300e6
    assert found["little"].peak_bytes < 100e6


def test_memory_that_a_runtime_takes_once_and_keeps() -> None:
    held: list[Tensor] = []

    def run(batch: Any) -> Tensor:
        if not held and len(batch["input_ids"]) > 1:
            held.append(torch.ones(50_000_000))
            time.sleep(0.05)
        return torch.empty(0)

    (found,) = cost.measure({"arena": cost.Candidate(run)}, ONE, MANY, rounds=2, warm_up=1).values()
    assert 150e6 < found.peak_bytes < 300e6


def test_attention_is_counted() -> None:
    q = torch.ones(1, 2, 16, 8)
    run = lambda batch: nn.functional.scaled_dot_product_attention(q, q, q)
    assert cost.flops(run, ONE) == 2 * (2 * 16 * 16 * 8) * 2  # two products, two heads


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 rounds and 1 samples"):
        cost.measure({}, ONE, MANY, rounds=1)


def test_an_estimate_is_called_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    with energy.metered() as asleep:
        time.sleep(0.2)
    with energy.metered() as busy:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    assert "estimate" in busy.source
    assert busy.joules == pytest.approx(0.2 * energy.WATTS_PER_CORE, rel=0.3)
    assert asleep.joules < busy.joules / 4


def test_the_processors_counters_are_added_and_may_begin_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(package: str, microjoules: int, name: str = "package-0") -> None:
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")

    monkeypatch.setattr(energy, "RAPL", tmp_path)
    write("intel-rapl:0", 9_000_000)
    write("intel-rapl:0:0", 5, "core")
    write("intel-rapl:1", 1_000_000, "package-1")
    write("intel-rapl:2", 5, "psys")
    with energy.metered() as found:
        write("intel-rapl:0", 1_000_000)  # 2 J, past the end of its range
        write("intel-rapl:0:0", 5_000_000, "core")
        write("intel-rapl:1", 1_500_000, "package-1")
        write("intel-rapl:2", 9_000_000, "psys")
    assert found.joules == pytest.approx(2.5)
    assert found.source == "RAPL"


def test_weights_in_several_formats_are_counted_once(tmp_path: Path) -> None:
    sizes = {"model.safetensors": 100, "pytorch_model.bin": 110, "tf_model.h5": 120, "onnx/model.onnx": 130, "tokenizer.json": 140}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * size)
    assert cost.bytes_of(tmp_path) == 100
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"0" * 7)
    assert cost.bytes_of(tmp_path) == 107
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert cost.bytes_of(tmp_path) == 110
    (tmp_path / "pytorch_model.bin").unlink()
    assert cost.bytes_of(tmp_path) == 250  # of another runtime: all that is no tokenizer


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_teacher_has_figures(to: Any) -> None:
    """torchao's weights cannot be asked how many are not 0."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = models.causal_lm(hidden_size=32, intermediate_size=64)  # groups of 32
    before = sum(p.numel() for p in model.parameters())
    quantise(model.eval().requires_grad_(False), to)
    run = lambda batch: model(input_ids=batch["input_ids"]).logits
    with torch.no_grad():
        found = cost.measure({"m": cost.Candidate(run, model)}, {"input_ids": torch.ones(1, 4).long()}, MANY, rounds=2, warm_up=0)["m"]
    assert (found.parameters, found.nonzero) == (before, None)


def test_the_meter_is_that_of_the_card_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts all cards of a machine, torch those that CUDA_VISIBLE_DEVICES leaves: the names are the same, the numbers are not."""
    joules = {"GPU-0000": 1, "GPU-0003": 2}
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetTotalEnergyConsumption=joules.get)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {0: SimpleNamespace(uuid="0003")}.get)
    assert energy._gpu_millijoules() == 2
