"""Every sweep that is shipped makes runs that the real parser accepts, the same by `wandb agent` and as a Slurm array."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from distill import folders
from distill.cli import main
from distill.sweep import elements
from tests import pair
from tests.test_command import config
from tests.wandb_server import server

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
GRIDS = [path for path in SWEEPS if "method: grid" in path.read_text()]


def parsed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return printed


def value_at(config: dict[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found["init_args"][part] if "init_args" in found and part not in found else found[part]
    return found


def by_agent(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The arguments after train.py as wandb's agent makes them."""
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})["args"]
    words = [word for entry in sweep["command"] for word in (args if entry == "${args}" else [entry])]
    return words[words.index(sweep["program"]) + 1 :]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_elements_are_what_wandbs_agent_would_run(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    choices = {key: given.get("values", [given.get("value")]) for key, given in sweep["parameters"].items()}
    expected = [by_agent(sweep, dict(zip(choices, point, strict=True))) for point in itertools.product(*choices.values())]
    assert elements(path) == expected
    assert len({tuple(element) for element in expected}) == len(expected) > 1


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_the_parser_accepts_every_element(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for element in elements(path):
        config = parsed(element, capsys)
        for word in element:
            key, equals, value = word.removeprefix("--").partition("=")
            assert not equals or value_at(config, key) == yaml.safe_load(value)


@pytest.mark.parametrize("path", [path for path in SWEEPS if path not in GRIDS], ids=lambda path: path.name)
def test_the_parser_accepts_both_ends_of_a_search(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = yaml.safe_load(path.read_text())
    for pick in (lambda given: given.get("min", given.get("values", [0])[0]), lambda given: given.get("max", given.get("values", [0])[-1])):
        values = {key: pick(given) for key, given in sweep["parameters"].items()}
        config = parsed(by_agent(sweep, values), capsys)
        assert {key: value_at(config, key) for key in values} == values


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_says_first_what_it_is_for_and_logs_to_wandb(path: Path) -> None:
    assert path.read_text().startswith("# ")
    sweep = yaml.safe_load(path.read_text())
    assert "--logger=wandb" in sweep["command"]
    assert sweep["metric"]["name"] in ("val/loss", "val/accuracy", "val/kl", "val/agreement")


def test_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "program: train.py\nmethod: grid\nparameters:\n  a.b: {values: [1, x y]}\n  c: {value: null}\n  d: {values: [true, 1.0e-05]}\n"
        "command: [python, '${program}', --config, q.yaml, '${args}', --last=1]\n"
    )
    head = ["--config", "q.yaml"]
    assert elements(path) == [
        [*head, "--a.b=1", "--c=None", "--d=True", "--last=1"],
        [*head, "--a.b=1", "--c=None", "--d=1e-05", "--last=1"],
        [*head, "--a.b=x y", "--c=None", "--d=True", "--last=1"],
        [*head, "--a.b=x y", "--c=None", "--d=1e-05", "--last=1"],
    ]
    # what scripts/slurm/array.sbatch makes of a line
    printed = subprocess.run(
        [sys.executable, "-m", "distill.sweep", str(path)], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    for line, element in zip(printed.splitlines(), elements(path), strict=True):
        words = subprocess.run(["xargs", "printf", "%s\\n"], input=line, check=True, capture_output=True, text=True).stdout.splitlines()
        assert words == shlex.split(line) == element


GRID = {"program": "t.py", "method": "grid", "parameters": {"a": {"value": 1}}, "command": ["python", "t.py", "${args}"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "bayes"}, "method is bayes, of which only the server knows the runs"),
        ({"parameters": None}, "is no sweep: it has no parameters"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "a has neither value nor values"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}}}, "a nested key is written with dots"),
        ({"command": None}, "command must have the program"),
        ({"command": ["python", "t.py"]}, "command must have the program"),
        ({"command": ["python", "t.py", "${args_no_hyphens}", "${args}"]}, "${args_no_hyphens} in command is known to `wandb agent` alone"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(GRID | change))
    with pytest.raises(ValueError) as caught:
        elements(path)
    assert said in str(caught.value)
    done = subprocess.run([sys.executable, "-m", "distill.sweep", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, f"error: {caught.value}\n")


def test_runs_of_an_agent_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the agent's job
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert folders.default_name(Namespace(config=["configs/kd.yaml"])) == "kd-abc"


def test_no_heavy_import() -> None:
    code = "import sys, distill.sweep; sys.exit(bool({'torch', 'wandb', 'pytorch_lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_wandbs_agent_runs_one(tmp_path: Path) -> None:
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    given = config()
    given["trainer"]["val_check_interval"] = 3
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(given))
    shipped = yaml.safe_load(GRIDS[0].read_text())
    command = [str(ROOT / "train.py") if word == "train.py" else word for word in shipped["command"]]
    command[command.index("kd_llama.yaml")] = "kd.yaml"
    run = {"type": "run", "run_id": "r1", "program": "train.py", "args": {"model.losses.kd.temperature": {"value": 3.0}}}
    commands = iter([[run]])
    sweep = {"id": "1", "name": "s1", "config": yaml.safe_dump(shipped | {"command": command}), "runs": {"edges": []}}
    answers: dict[str, Any] = {
        "Viewer": {"viewer": {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}},
        "SweepWithRuns": {"project": {"sweep": sweep}},
        "CreateAgent": {"createAgent": {"agent": {"id": "a1"}}},
        "Heartbeat": lambda body: {"agentHeartbeat": {"agent": {"id": "a1"}, "commands": json.dumps(next(commands, []))}},
    }
    with server(answers=answers) as (port, received):
        home = {name: str(tmp_path / "home") for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC")}
        environ = os.environ | home | {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"  # the agent starts `python`
        agent = [sys.executable, "-m", "wandb", "agent", "--count", "1", "e/p/s1"]
        done = subprocess.run(agent, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    folder = tmp_path / "runs" / "kd-r1"
    assert (folder / "report.json").is_file(), done.stderr[-5000:]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["losses"]["kd"]["init_args"]["temperature"] == 3.0
    assert (folder / "wandb_id").read_text() == "r1"
    history = [body for body in received if "wandb-history.jsonl" in body]
    assert any("val/loss" in body for body in history), "what the sweep is after has reached the server"
    upserts = [json.loads(body)["variables"] for body in received if '"UpsertBucket"' in body]
    assert ("r1", "s1") in {(asked["name"], asked["sweep"]) for asked in upserts}
    assert {asked["name"] for asked in upserts} == {"r1"}
