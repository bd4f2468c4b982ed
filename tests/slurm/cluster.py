"""The Slurm of the tests: started once, asked by scontrol, and torn down whatever happens."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@contextmanager
def slurm() -> Iterator[None]:
    """Have Slurm with the nodes n1 to n3 run; on the third jobs are preempted."""
    if os.geteuid() != 0:
        pytest.skip("starting slurmctld, slurmd and munged takes root")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("there is no Slurm, and no apt-get to install it with")
    environment = os.environ | {"SLURM_CI_NODES": "3"}
    try:
        up = subprocess.run([HERE / "up.sh"], env=environment, capture_output=True, text=True, timeout=120, check=False)
        if "apt-get failed" in up.stderr:
            pytest.skip(f"Slurm cannot be installed: {up.stderr}")
        if "is not ours" in up.stderr:
            pytest.skip(f"this machine belongs to another Slurm: {up.stderr}")
        assert up.returncode == 0, up.stderr
        yield
    finally:
        subprocess.run([HERE / "down.sh"], env=environment, check=False, timeout=120)


def sbatch(*args: str | Path, **variables: str) -> str:
    """Submit, and give the job's id."""
    command = ["sbatch", "--parsable", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def show(job: str) -> dict[str, str]:
    """What `scontrol show job` says."""
    text = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", text))


def wait(what: str, condition: Callable[[], bool], seconds: float = 400) -> None:
    """Look until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def wait_for_end(job: str) -> dict[str, str]:
    """Wait until a job is over, and give what scontrol says then."""
    wait(f"end of {job}", lambda: show(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
    return show(job)
