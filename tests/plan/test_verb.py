"""`plan`, as a person meets it: parsed as `fit` is, nothing loaded, nothing left behind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import main
from distill.plan.job import STRATEGIES
from distill.plan.memory import memory
from distill.plan.table import Cluster, fits, named, strategies
from tests import pair
from tests.plan.jobs import LLAMA_1B, LLAMA_8B, job, shape
from tests.test_command import config

CONFIG = Path(__file__).parents[2] / "configs" / "kd_llama3_8b_to_1b.yaml"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher's configuration and `kd.yaml`; no weights and no data."""
    monkeypatch.chdir(tmp_path)
    pair.teacher_folder(tmp_path / "teacher")
    for weights in (tmp_path / "teacher").glob("*.safetensors"):
        weights.unlink()
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config()))
    return tmp_path


def plan(*args: str) -> int:
    return main(["plan", "--config", "kd.yaml", *args])


def test_it_says_what_fits_and_how_long_it_takes_without_weights_or_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert plan("--nodes=2", "--gpus=4", "--trainer.strategy=zero2") == 0
    printed = capsys.readouterr().out
    for part in ("2 nodes × 4", "4 rows × 32 × 1 accumulated × 8 ranks", "estimated: 989 TFLOP/s × 35%", "6 steps", "all-gather"):
        assert part in printed
    assert all(strategy.name in printed for strategy in STRATEGIES)
    assert re.search(r"▸ ZeRO-2 .* yes", printed)
    assert sorted(here.rglob("*")) == before


def test_nodes_and_devices_are_the_trainers_unless_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--trainer.num_nodes=3", "--trainer.devices=2") == 0
    assert "3 nodes × 2" in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_said_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpu_memory=0.00001") == 0
    assert re.search(r"▸ one process .* NO", capsys.readouterr().out)


def test_a_measured_micro_step_takes_the_place_of_hardware_figures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus=2", "--measure") == 0
    printed = capsys.readouterr().out
    rate = re.search(r"tokens/s\s+([\d,]+) measured: one micro-step of ([\d.e-]+) s on this CPU, × 2", printed)
    assert rate is not None
    assert float(rate[1].replace(",", "")) == pytest.approx(2 * 4 * 32 / float(rate[2]), rel=0.02)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.losses.kd.temprature=4"], "Did you mean"),
        (["--nodez=2"], "Did you mean 'nodes'?"),
        (["--gpus=0"], "gpus"),
        (["--mfu=0"], "mfu must be > 0, got 0.0"),
        (["--model.teacher.model=nowhere/at/all"], "model.teacher.model: no folder 'nowhere/at/all'"),
        (["--model.student.config.hidden_sise=8"], "llama has no key 'hidden_sise'. Did you mean 'hidden_size'?"),
    ],
)
def test_a_mistake_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert plan(*args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_gated_model_without_a_network_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(CONFIG)]) == 2
    error = capsys.readouterr().err
    assert "model.teacher.model: cannot load 'meta-llama/Llama-3.1-8B'" in error
    assert "Traceback" not in error


def test_a_teacher_that_its_recipe_would_make_is_planned_from_the_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = config()
    student = recipe["model"]["student"]["init_args"]["config"] | {"hidden_size": 32}
    recipe["model"] = {"student": {"class_path": "FromConfig", "init_args": {"config": student}}, "losses": {"ce": "CrossEntropy"}}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"name": "made"}))
    assert plan("--model.teacher.model=runs/made/student", "--model.teacher.recipe=recipe.yaml") == 0
    # embedding 16 · 32, layer: q, o 32², k, v 32 · 16, three of 32 · 32, two norms; last norm
    assert f"{16 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32 + 2 * 32 + 32:,} parameters × 4 bytes" in capsys.readouterr().out


def folders(here: Path) -> list[str]:
    """The Llama pair, as folders with nothing but a configuration."""
    for name, literal in (("8b", LLAMA_8B), ("1b", LLAMA_1B)):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps(literal | {"architectures": ["LlamaForCausalLM"]}))
    return ["--model.teacher.model=./8b", "--model.student.model=./1b"]


@pytest.mark.parametrize(
    ("preset", "ranks", "row"),
    [(None, 1, "one process"), ("8_gpus", 8, "ZeRO-1"), ("32_gpus", 32, "ZeRO-2")],
    ids=["1", "8", "32"],
)
def test_the_shipped_presets_fit_80_gb(here: Path, capsys: pytest.CaptureFixture[str], preset: str | None, ranks: int, row: str) -> None:
    overlay = ["--config", f"scale/{preset}.yaml"] if preset else []
    assert main(["plan", "--config", str(CONFIG), *overlay, *folders(here)]) == 0
    printed = capsys.readouterr().out
    assert "8,030,261,248 parameters × 2 bytes" in printed
    assert f"{ranks} ranks of 80 GB" in printed
    assert re.search(rf"▸ {row} .* yes", printed)


def test_what_fits_leaves_a_tenth_of_the_card() -> None:
    found = memory(job(shape(LLAMA_1B)), STRATEGIES[0], 8)
    assert fits(found, Cluster(1, 8, found.peak / 0.9e9 + 0.01, 1.0))
    assert not fits(found, Cluster(1, 8, found.peak / 0.9e9 - 0.01, 1.0))


def test_names_of_strategies_find_their_row() -> None:
    rows = {s.name for s in strategies(8)}
    known: dict[str, Any] = {
        "auto": "DDP",
        "ddp": "DDP",
        "zero3": "ZeRO-3",
        "deepspeed_stage_2": "ZeRO-2",
        "pytorch_lightning.strategies.ModelParallelStrategy": "FSDP2",
    }
    assert {name: named(name, 8) for name in known} == known
    assert set(known.values()) <= rows
    assert named("auto", 1) == "one process"


def test_what_compressions_add_is_said_not_to_be_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [{"class_path": "Pruning", "init_args": {"sparsity": 0.5}}, {"class_path": "LearningRateMonitor"}]
    assert plan(f"--trainer.callbacks={json.dumps(callbacks)}") == 0
    assert "Not counted: masks, scores and fake quantisers of Pruning\n" in capsys.readouterr().out
