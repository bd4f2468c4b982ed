"""Jobs of a real Slurm, from the shipped templates: stopped by signals, preempted, cancelled, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import pair
from tests.slurm.cluster import ENVIRONMENT, ROOT, sbatch, show, slurm, wait, wait_for_end
from tests.test_command import config

pytestmark = pytest.mark.slow
TEMPLATES = ROOT / "scripts" / "slurm"
STEPS, HELD = 8, 4


@dataclass
class Place:
    """A folder with a teacher, data and the configurations of the jobs; their runs and outputs go there."""

    folder: Path

    def write(self, name: str, late: dict[str, Any] | None) -> str:
        """Write a configuration of eight steps, and give its path."""
        made = config()
        made["model"]["teacher"]["init_args"]["model"] = str(self.folder / "teacher")
        made["data"]["init_args"] |= {"train_data": str(self.folder / "prompts.jsonl"), "tokenizer": str(self.folder / "teacher")}
        made |= {"runs": str(self.folder / "runs"), "save_every": 100}
        made["trainer"] |= {"max_steps": STEPS, "log_every_n_steps": 1}
        if late:
            callback = {"class_path": "tests.slurm.late.Late", "init_args": {"folder": str(self.folder), "step": HELD, **late}}
            made["trainer"]["callbacks"] = [callback]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(made))
        return str(path)

    def wait_until_held(self, job: str) -> None:
        """Wait until a rank of the job sits in step 4."""

        def held() -> bool:
            assert show(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), self.output(job)
            return (self.folder / f"ready-{job}").exists()

        wait(f"step {HELD} of {job}", held)

    def output(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def stopped(self, job: str) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob(f"stopped-{job}-*"))]

    def steps(self, run: str) -> list[int]:
        lines = [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if "train/loss" in line]


def skewed(place: Place) -> None:
    """Two nodes with a task each: SIGUSR1 reaches both while the second is in mid-step, and stays there for three seconds."""
    options = [f"--output={place.folder}/%j.out", "--ntasks-per-node=1", "--gpus-per-node=1", "--exclude=n3"]
    job = sbatch(*options, TEMPLATES / "many_nodes.sbatch", "--config", place.write("skewed", {"rank": 1, "seconds": 3}), *ON_CPU)
    place.wait_until_held(job)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    ended = wait_for_end(job)
    check_went_on(place, job, ended, "skewed", "SIGUSR1", 138)


def preempted(place: Place) -> None:
    """One node with two tasks: a job in a partition of higher priority takes it, announced by nothing but SIGTERM."""
    options = [f"--output={place.folder}/%j.out", "--ntasks-per-node=2", "--gpus-per-node=2", "--nodelist=n3"]
    job = sbatch(*options, TEMPLATES / "one_node.sbatch", "--config", place.write("preempted", {"rank": 0, "seconds": 0}), *ON_CPU)
    place.wait_until_held(job)
    urgent = sbatch("--partition=urgent", "--nodelist=n3", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert wait_for_end(urgent)["JobState"] == "COMPLETED"
    ended = wait_for_end(job)
    check_went_on(place, job, ended, "preempted", "SIGTERM", 143)


def check_went_on(place: Place, job: str, ended: dict[str, str], config: str, signal: str, status: int) -> None:
    output = place.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output
    run, step = f"{config}-{job}", HELD + 1
    saved = place.folder / "runs" / run / "checkpoints" / f"step-{step:08}.ckpt"
    line = f"Stopped by {signal} at step {step}; saved {saved}. Slurm's job {job} is back in the queue, and will go on from there."
    assert output.count(line) == 1, output
    told = [f"{step} Stopped({status})", f"{step} Stopped(0)"]
    assert place.stopped(job) == told, "both ranks, at the same step; rank 0 tells the status"
    assert place.steps(run) == list(range(STEPS)), "every step once: it went on exactly where it stopped"
    assert json.loads((place.folder / "runs" / run / "report.json").read_text())["steps"] == STEPS


def cancelled(place: Place) -> None:
    """`distill submit` submits; after `scancel`, which sends SIGTERM as well, the checkpoint is saved and the job stays cancelled."""
    command = [sys.executable, "train.py", "submit", "--config", place.write("cancelled", {"rank": 0, "seconds": 0}), *ON_CPU]
    environment = {"SBATCH_OUTPUT": f"{place.folder}/%j.out", "PATH": ENVIRONMENT["PATH"], "HOME": "/root"}
    command += ["--nodes", "1", "--gpus", "1", "--time", "10:00", "--partition", "first"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, said = done.stdout.rstrip().rsplit("\n", 1)
    assert "#SBATCH --time=10:00" in shown
    assert "#SBATCH --partition=first" in shown
    job = said.removeprefix("Submitted batch job ")
    place.wait_until_held(job)
    subprocess.run(["scancel", job], check=True)
    ended = wait_for_end(job)
    wait(f"the last word of {job}", lambda: "Stopped by SIGTERM" in place.output(job), 60)
    assert f"step-{HELD + 1:08}.ckpt. Slurm's job {job} is " in place.output(job)
    assert "stays so" in place.output(job)
    time.sleep(8)  # a requeued job would be back after five seconds
    assert ended["JobState"] == show(job)["JobState"] == "CANCELLED"
    assert show(job)["Restarts"] == "0"


def sweep(place: Place) -> None:
    """An array of two, of which the first fails: the second is not touched by it."""
    (place.folder / "grid.txt").write_text("--model.losses.kd.temperature=0\n--model.losses.kd.temperature=3 --name 'the second'\n")
    options = [f"--output={place.folder}/%A_%a.out", "--array=1-2", "--exclude=n3", TEMPLATES / "array.sbatch", place.folder / "grid.txt"]
    job = sbatch(*options, "--config", place.write("sweep", None), *ON_CPU)
    first, second = (wait_for_end(f"{job}_{element}") for element in (1, 2))
    assert (first["JobState"], first["ExitCode"]) == ("FAILED", "2:0")
    assert "temperature must be > 0, got 0.0" in place.output(f"{job}_1")
    assert (second["JobState"], second["ExitCode"]) == ("COMPLETED", "0:0"), place.output(f"{job}_2")
    run = place.folder / "runs" / "the second"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["losses"]["kd"]["init_args"]["temperature"] == 3.0
    assert place.steps("the second") == list(range(STEPS))


def stopped(place: Place) -> None:
    """Two tasks, of which one is stopped from outside: the other notices, and srun ends both."""
    options = [f"--output={place.folder}/%j.out", "--ntasks-per-node=2", "--gpus-per-node=2", "--exclude=n3"]
    config = place.write("stopped", {"rank": 1, "seconds": 0})
    job = sbatch(*options, TEMPLATES / "one_node.sbatch", "--config", config, *ON_CPU, "--watchdog_s=15")
    place.wait_until_held(job)
    wait("its process id", lambda: bool((place.folder / f"ready-{job}").read_text()))
    os.kill(int((place.folder / f"ready-{job}").read_text()), signal.SIGSTOP)
    start = time.monotonic()
    ended = wait_for_end(job)
    assert time.monotonic() - start < 60
    assert ended["JobState"] == "FAILED", "and not waited for until its time is up"
    said = "has said nothing for 15 s: it is stopped, swapping, or cut off from the network. The job ends; with --ckpt_path last it goes on"
    assert place.output(job).count(f"error: rank 1 on {ended['NodeList']} {said}") == 1, place.output(job)


def mismatched(place: Place) -> None:
    """Two tasks, and a trainer that is told of one device: each would train alone."""
    options = [f"--output={place.folder}/%j.out", "--ntasks-per-node=2", "--gpus-per-node=2", "--exclude=n3"]
    config = place.write("mismatched", None)
    job = sbatch(*options, TEMPLATES / "one_node.sbatch", "--config", config, *ON_CPU, "--trainer.devices=1")
    ended = wait_for_end(job)
    assert ended["JobState"] == "FAILED", place.output(job)  # with 2, or what srun says of the task that it ends for the other's failure
    assert "error: trainer.devices is 1, but Slurm has started 2 tasks on each node; set trainer.devices=2" in place.output(job)
    assert not (place.folder / "runs" / f"mismatched-{job}").exists()


def apart(place: Place) -> None:
    """Two nodes: the teacher is served on the first, and the student trains on the second."""
    options = [f"--output={place.folder}/%j.out", "--ntasks-per-node=1", "--gpus-per-node=1", "--exclude=n3"]
    job = sbatch(*options, TEMPLATES / "teacher_apart.sbatch", "--config", place.write("apart", None), *ON_CPU, TEACHER_PORT="18100")
    ended = wait_for_end(job)
    assert ended["JobState"] == "COMPLETED", place.output(job)
    assert "http://n1:18100" in place.output(job)
    assert place.steps(f"distill-{job}") == list(range(STEPS))
    report = json.loads((place.folder / "runs" / f"distill-{job}" / "report.json").read_text())
    assert report["models"]["teacher"]["parameters"] > report["models"]["student distilled"]["parameters"]


ON_CPU = ["--trainer.accelerator=cpu"]
SCENARIOS = [skewed, preempted, cancelled, sweep, stopped, mismatched, apart]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """All scenarios at once: each waits for Slurm and for imports most of the time."""
    place = Place(tmp_path_factory.mktemp("slurm"))
    with slurm():
        pair.teacher_folder(place.folder / "teacher")
        pair.prompts(place.folder / "prompts.jsonl", 80)
        with ThreadPoolExecutor(len(SCENARIOS)) as pool:
            yield {scenario.__name__: pool.submit(scenario, place) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_job(running: dict[str, Future[None]], scenario: Any) -> None:
    running[scenario.__name__].result()
