from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.strategies import StrategyRegistry

import distill.parallel  # noqa: F401
from distill.parallel.deepspeed import DeepSpeed, DeepSpeedCPU
from distill.parallel.fsdp import FSDP2
from distill.types import ConfigError
from tests import pair


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3), ("zero3_offload_nvme", 3)])
def test_one_line_chooses_a_stage(name: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    strategy = pair.trainer(strategy=name).strategy
    assert isinstance(strategy, DeepSpeedCPU)
    zero: dict[str, Any] = strategy.config["zero_optimization"]  # type: ignore[index]
    assert zero["stage"] == stage
    devices = [zero[key]["device"] for key in ("offload_optimizer", "offload_param") if key in zero]
    assert devices == {"zero3_offload": ["cpu", "cpu"], "zero3_offload_nvme": ["nvme", "nvme"]}.get(name, [])


def test_gpus_are_taken_where_deepspeed_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert isinstance(StrategyRegistry.get("zero2"), DeepSpeed)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert isinstance(StrategyRegistry.get("zero2"), DeepSpeed)


def test_fsdp2() -> None:
    assert isinstance(pair.trainer(strategy="fsdp2").strategy, FSDP2)


def test_yaml_finds_the_classes_by_their_short_names(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    parser = LightningArgumentParser()
    parser.add_argument("--strategy", type=pair.pl.strategies.Strategy)
    args = parser.parse_args(["--strategy", "DeepSpeedCPU", "--strategy.config", str(tmp_path / "ds.json")])
    strategy = parser.instantiate_classes(args).strategy
    assert strategy.config["zero_optimization"] == {"stage": 1}


def test_a_wrong_json_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the DeepSpeed config"):
        DeepSpeedCPU(str(tmp_path / "none.json"))
