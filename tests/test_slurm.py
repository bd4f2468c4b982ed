"""What a job is told by Slurm's variables, and when it is put back into the queue; `scontrol` is a script here, real in tests/slurm."""

from pathlib import Path

import pytest

from distill import slurm
from distill.types import ConfigError

SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"{log}"
case $1 in
    show) echo "JobId=12 JobName=x JobState={state} Reason=None Requeue={requeue} Restarts=0" ;;
    requeue) {answer} ;;
esac
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The calls that were made."""
    return fake(tmp_path, monkeypatch)


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, state: str = "RUNNING", requeue: int = 1, answer: str = "true") -> Path:
    """Put a `scontrol` before any other, that writes down how it was called."""
    log, script = folder / "calls", folder / "bin" / "scontrol"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCONTROL.format(log=log, state=state, requeue=requeue, answer=answer))
    script.chmod(0o755)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    return log


def calls(log: Path) -> list[str]:
    return log.read_text().splitlines()


def test_a_running_job_is_requeued(scontrol: Path) -> None:
    assert slurm.requeue() == "Slurm's job 12 is back in the queue, and will go on from there."
    assert calls(scontrol) == ["show job --oneliner 12", "requeue 12"]


def test_an_element_of_an_array_by_its_own_id(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert "9_4 is back" in slurm.requeue()
    assert calls(scontrol)[1] == "requeue 9_4"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", "TIMEOUT"])
def test_only_a_running_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    log = fake(tmp_path, monkeypatch, state)
    assert slurm.requeue() == f"Slurm's job 12 is {state} and stays so."
    assert len(calls(log)) == 1


def test_not_one_that_shall_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake(tmp_path, monkeypatch, requeue=0)
    assert "submitted with --no-requeue" in slurm.requeue()
    assert len(calls(log)) == 1


def test_a_refusal_and_a_missing_scontrol_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, answer="echo Requested operation is presently disabled >&2; exit 1")
    assert slurm.requeue() == "Slurm's job 12 could not be requeued: Requested operation is presently disabled."
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be requeued: [Errno 2]" in slurm.requeue()


@pytest.mark.parametrize(("layout", "tasks", "nodes"), [("8", 8, 1), ("2(x4)", 2, 4), ("1(x32)", 1, 32)])
def test_tasks_and_nodes_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch, layout: str, tasks: int, nodes: int) -> None:
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", layout)
    assert slurm.tasks_and_nodes() == (tasks, nodes)


def test_nodes_with_different_numbers_of_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8,7")
    with pytest.raises(ConfigError, match="8,7 tasks on the nodes"):
        slurm.tasks_and_nodes()


def test_a_restart_is_slurms_or_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert slurm.restarts() == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert slurm.restarts() == 3
