"""The light part of the command: what answers before the heavy imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from distill.cli import HELP, VERBS, find_configs, main
from tests import pair
from tests.test_command import config

ROOT = Path(__file__).parents[1]


def test_help_is_one_page_and_needs_no_heavy_import() -> None:
    code = "import sys; from distill.cli import main; main(['--help']); heavy = {'torch', 'transformers'} & set(sys.modules)"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(len(heavy))"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert done.stdout == HELP
    after = os.times()  # the processor's seconds: the clock's are longer beside other tests
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0
    assert len(HELP.splitlines()) <= 45
    assert max(len(line) for line in HELP.splitlines()) <= 120
    assert all(verb in HELP for verb in VERBS)


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"], ["help"]])
def test_help_answers_to_what_people_type(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert capsys.readouterr().out == HELP


def test_a_wrong_verb_and_a_wrong_config_name_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validat"]) == 2
    verbs = ", ".join(VERBS)
    assert capsys.readouterr().err == f"error: no verb 'validat'. Did you mean 'validate'?; the verbs are {verbs}\n"
    assert main(["--config", "kd_lama.yaml"]) == 2
    assert "no config 'kd_lama.yaml' here or in configs/. Did you mean 'kd_llama.yaml'?" in capsys.readouterr().err


def test_configs_are_found_and_the_dry_run_flag_is_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("")
    given = ["--config", "x.yaml", "--config=kd_llama.yaml", "-c", "kd_bert.yaml", "--dry-run", "--name", "n"]
    shipped = str(ROOT / "configs")
    want = ["--config", "x.yaml", f"--config={shipped}/kd_llama.yaml", "-c", f"{shipped}/kd_bert.yaml", "--dry_run=true", "--name", "n"]
    assert find_configs(given) == want


@pytest.mark.parametrize(("verb", "key"), [("export", "--ptq"), ("cost", "--rounds"), ("consolidate", "--out"), ("plan", "--gpus")])
def test_the_help_of_a_verb_is_of_that_verb(verb: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python train.py {verb} --config FILE")
    assert key in printed
    assert "--trainer." not in printed
    assert len(printed.splitlines()) <= 45


def test_the_full_reference_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in ("--trainer.max_steps", "--model.losses", "--baseline", "--name"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_run_does(tmp_path: Path) -> None:
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    endless = config()
    endless["trainer"] |= {"max_steps": 100_000}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(endless))
    command = [sys.executable, str(ROOT / "train.py"), "--config", "kd.yaml", "--name", "a"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    checkpoint = tmp_path / "runs" / "a" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "Go on from the last checkpoint with --config runs/a/config.yaml --ckpt_path last" in error
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        saved = len((tmp_path / "runs/a/metrics.jsonl").read_text().splitlines())
        assert (
            main(["--config", "runs/a/config.yaml", "--ckpt_path", "last", "--trainer.max_steps=100001", "--trainer.max_time=00:00:00:02"])
            == 0
        )
    finally:
        os.chdir(here)
    assert len((tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()) > saved
