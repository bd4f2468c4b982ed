"""`distill submit`: the rendered job, and what is refused before it is submitted. A real submission is in tests/slurm."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from distill import launch
from distill.cli import main
from tests import pair
from tests.test_command import config

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
GIVEN = ["--config", "kd.yaml", "--dry-run"]


def header(text: str) -> dict[str, str]:
    """The options that sbatch sees."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def template(name: str) -> str:
    return (ROOT / "scripts" / "slurm" / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_is_bash_and_has_what_a_requeue_needs(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    options = header(path.read_text())
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time", "requeue"} <= options.keys()
    assert options["open-mode"] == "append"
    assert options["signal"] == "USR1@120", "to the steps: with B: it would reach the shell alone"
    assert "ntasks" not in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert re.search(r'\nsrun --kill-on-bad-exit=1 [^\n]*python train\.py ([^\n]* )?"\$@"', path.read_text().replace("\\\n", ""))
    assert "scontrol show hostnames" in path.read_text()


def test_the_templates_differ_in_what_they_are_for() -> None:
    assert {path.stem for path in TEMPLATES} == {"one_node", "many_nodes", "array", "teacher_apart"}
    one, many, array = (header(template(name)) for name in ("one_node", "many_nodes", "array"))
    assert (one["nodes"], many["nodes"], array["array"]) == ("1", "2", "1")
    same = [key for key in one if key not in ("nodes", "ntasks-per-node", "gpus-per-node", "output")]
    assert all(one[key] == many[key] == array[key] for key in same)


def test_what_is_given_replaces_the_templates_line_and_nothing_else() -> None:
    options = ["--nodes=4", "--gpus", "2", "--time", "4:00:00", "--partition=gpu", "--account", "me"]
    job = launch.job([*GIVEN, *options, "--model.losses.kd.temperature=4"])
    assert job.dry_run
    assert job.args == ["--config", "kd.yaml", "--model.losses.kd.temperature=4"]
    told = {"nodes": "4", "ntasks-per-node": "2", "gpus-per-node": "2", "time": "4:00:00", "partition": "gpu", "account": "me"}
    assert header(job.text) == header(template("many_nodes")) | told
    before, after = template("many_nodes").splitlines(), job.text.splitlines()
    [added] = [line for line in after if line.startswith("set -- ")]
    after.remove(added)
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    assert all("SBATCH --" in line for pair in changed for line in pair)
    assert added == "set -- --config kd.yaml --model.losses.kd.temperature=4"


def test_one_node_is_the_default_and_the_header_stays() -> None:
    assert header(launch.job(GIVEN).text) == header(template("one_node"))


def test_arguments_reach_the_command_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendered script is run, with stand-ins for the two commands of Slurm."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.txt").write_text("--a=1 --name 'x y'\n--a=2 --b=\"$HOME;*\"\n")
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo n1")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = launch.job([*GIVEN, "--array", "grid.txt", "--spaced", "a b"]).text
    assert header(text)["array"] == "1-2"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", "-e"], input=text, env=environment, capture_output=True, text=True, check=True)
    given = done.stdout.splitlines()
    assert given[0] == "--kill-on-bad-exit=1"
    assert given[1:] == ["distill", "--config", "kd.yaml", "--spaced", "a b", "--a=2", "--b=$HOME;*"], (
        "no train.py here: the installed command"
    )
    assert launch.job([*GIVEN, "--array", "grid.txt"]).args[-3:] == ["--a=1", "--name", "x y"]


def test_a_site_can_keep_templates_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts" / "slurm").mkdir(parents=True)
    (tmp_path / "scripts" / "slurm" / "one_node.sbatch").write_text('#!/bin/bash\n#SBATCH --qos=ours\nsrun python train.py "$@"\n')
    assert header(launch.job([*GIVEN, "--time=10:00"]).text) == {"qos": "ours", "time": "10:00"}


@pytest.mark.parametrize("time", ["30", "10:00", "4:00:00", "2-12", "1-0:30", "1-00:30:00"])
def test_times_as_slurm_takes_them(time: str) -> None:
    assert header(launch.job([*GIVEN, "--time", time]).text)["time"] == time


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--time", "4h"], "--time '4h' is none of"),
        (["--time", "1:2:3:4"], "--time '1:2:3:4' is none of"),
        (["--time", "2"], "--time 2 is 120 s, but the job is told to stop 120 s before the end"),
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--gpus", "x"], "argument --gpus: invalid int value: 'x'"),
        (["--array", "missing.txt"], "missing.txt"),
        (["--array", "blank.txt"], "line 2 of blank.txt is empty"),
        (["--config", "kd_lama.yaml"], "no config 'kd_lama.yaml'"),
        (["--model.losses.kd.temprature=2"], "does not accept option 'temprature'. Did you mean 'temperature'?"),
        (["--trainer.max_stps=2"], "does not accept option 'trainer.max_stps'. Did you mean 'trainer.max_steps'?"),
        (["--model.losses.kd.temperature=0"], "temperature must be > 0, got 0.0"),
        (["--partion=gpu"], "does not accept option 'partion'"),
        (["--gpus=2", "--trainer.devices=4"], "trainer.devices is 4, but the job has 2 tasks on each node; set trainer.devices=2, or"),
        (["--trainer.devices=4"], "trainer.devices is 4, but the job has 8 tasks on each node; "),
        (["--nodes=2", "--trainer.num_nodes=4"], "trainer.num_nodes is 4, but the job has tasks on 2 nodes; set trainer.num_nodes=2"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    prepare(tmp_path, monkeypatch)
    capsys.readouterr()
    assert main(["submit", *GIVEN, *args]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert len([line for line in shown.err.splitlines() if line.startswith("error: ")]) == 1


def test_the_dry_run_prints_the_job_and_the_run_without_sbatch_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, monkeypatch)
    capsys.readouterr()
    assert main(["submit", *GIVEN, "--nodes=2", "--gpus=4", "--trainer.devices=4", "--trainer.num_nodes=2"]) == 0
    capsys.readouterr()
    assert main(["submit", *GIVEN]) == 0
    assert capsys.readouterr().out == launch.job(GIVEN).text
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "--config", "kd.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no sbatch here; submit from a login node of the cluster, or look at the job with --dry-run\n"
    )
    assert main(["submit", "--nodes", "2"]) == 2
    assert "say what to train, e.g. --config kd_llama.yaml" in capsys.readouterr().err


def test_what_sbatch_says_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, monkeypatch)
    capsys.readouterr()
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/usr/bin/env bash\ncat >given\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["submit", "--config", "kd.yaml", "--gpus=1"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "given").read_text() + "Submitted batch job 7\n"
    sbatch.write_text("#!/usr/bin/env bash\necho sbatch: error: Invalid account >&2\nexit 1\n")
    assert main(["submit", "--config", "kd.yaml"]) == 2
    assert capsys.readouterr().err == "error: sbatch: error: Invalid account\n"


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    pair.teacher_folder(folder / "teacher")
    pair.prompts(folder / "prompts.jsonl")
    (folder / "kd.yaml").write_text(yaml.safe_dump(config()))
    (folder / "blank.txt").write_text("--a=1\n\n--a=2\n")


def test_a_sweep_is_no_list_of_arguments(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("method: grid\n")
    with pytest.raises(ValueError, match=r"--array wants a text file, .*python -m distill\.sweep .*grid\.yaml"):
        launch.job(["--config", "x.yaml", "--array", str(tmp_path / "grid.yaml")])
