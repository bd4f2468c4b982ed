"""Every shipped config parses strictly, and the ones that can run here do run."""

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
def test_kd_llama_runs_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = yaml.safe_load((CONFIGS[0].parent / "teacher_llama.yaml").read_text())
    recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    recipe["data"]["init_args"] |= {"max_bytes": 1_500_000}
    (tmp_path / "teacher_llama.yaml").write_text(yaml.safe_dump(recipe))
    short = ["--data.max_bytes=1500000", "--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=3"]
    assert main(["fit", "--config", "kd_llama.yaml", "--name", "a", *short]) == 0
    printed = capsys.readouterr().out
    for part in ("training it first, once", "Baseline: the same student alone", "student alone", "student distilled"):
        assert part in printed
