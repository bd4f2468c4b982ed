"""Every shipped config parses strictly, and the ones that can run here do run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from distill.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["losses"], "the resolved config must show the losses"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_says_first_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", [p for p in CONFIGS if "8b" in p.name or "bert" in p.name], ids=lambda path: path.name)
def test_a_hub_model_without_a_network_is_one_clear_line(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("text\tlabel\n" + "a b\tx\nc d\ty\n" * 50)
    assert main(["fit", "--config", str(path), "--dry-run", "--trainer.precision=32-true"]) == 2
    error = capsys.readouterr().err
    assert "the hub cannot be reached; connect to a network, or download the model first and give its folder" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_kd_llama_runs_from_nothing_from_a_store_and_from_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = yaml.safe_load((CONFIGS[0].parent / "teacher_llama.yaml").read_text())
    recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    recipe["data"]["init_args"] |= {"max_bytes": 600_000}
    recipe["model"]["student"]["init_args"]["config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    (tmp_path / "teacher_llama.yaml").write_text(yaml.safe_dump(recipe))
    short = ["--data.max_bytes=600000", "--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=3"]

    assert main(["fit", "--config", "kd_llama.yaml", "--name", "a", *short]) == 0
    printed = capsys.readouterr().out
    for part in ("training it first, once", "Baseline: the same student alone", "student alone", "student distilled"):
        assert part in printed

    assert main(["cache", "--config", "kd_llama_cached.yaml", *short]) == 0
    assert main(["fit", "--config", "kd_llama_cached.yaml", "--name", "b", "--baseline=false", *short]) == 0
    assert "KL and agreement are not measured" in capsys.readouterr().out

    with served("kd_llama.yaml", "--data.max_bytes=600000") as url:
        remote = f"--model.teacher.init_args.url={url}"
        assert main(["fit", "--config", "kd_llama_served.yaml", "--name", "c", "--baseline=false", remote, *short]) == 0
    here, there = ((tmp_path / "runs" / name / "student" / "model.safetensors").read_bytes() for name in ("a", "c"))
    assert here == there


@contextmanager
def served(config: str, *options: str) -> Iterator[str]:
    """Run `serve` in a process of its own; give its address."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CONFIGS[0].parents[1] / "train.py"), "serve", "--config", config, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("serving"))
            yield line.split(" at ")[1].strip()
        finally:
            process.kill()
