"""What Slurm tells a job about itself, and the one thing that a job asks of Slurm: to be put back into the queue."""

import os
import re
import subprocess

from distill.types import ConfigError


def job() -> str | None:
    """The id that `scontrol` knows this job by, None outside of Slurm."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def by_srun() -> bool:
    """Whether srun has started this process; a batch script has the job's other variables as well, but is no step."""
    return "SLURM_STEP_ID" in os.environ


def restarts() -> int:
    """How often Slurm or torchrun has started this run before."""
    return max(int(os.environ.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def tasks_and_nodes() -> tuple[int, int]:
    """Tasks on each node, and nodes, of the step that this process belongs to.

    Raises:
        ConfigError: the nodes have different numbers of tasks.
    """
    layout = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # e.g. 2(x4), or 8,7
    if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", layout)):
        raise ConfigError(f"srun has started {layout} tasks on the nodes, where each must have as many; use --ntasks-per-node")
    return int(found[1]), int(found[2] or 1)


def requeue() -> str:
    """Put this job back into the queue, where it is Slurm's to run it; gives a sentence that says what came of it.

    Only a job in state RUNNING: one that `scancel` is ending would come back from the dead, and Slurm itself requeues what it preempts
    once the time of grace is over. (A `scancel` in the milliseconds between the look and the call is not noticed.)
    """
    name = job()
    try:
        described = _scontrol("show", "job", "--oneliner", str(name))
        fields = dict(re.findall(r"\b(JobState|Requeue)=(\S+)", described))
        if fields.get("JobState") != "RUNNING":
            return f"Slurm's job {name} is {fields.get('JobState')} and stays so."
        if fields.get("Requeue") == "0":
            return f"Slurm's job {name} was submitted with --no-requeue, and ends here."
        _scontrol("requeue", str(name))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"Slurm's job {name} could not be requeued: {' '.join(said.split())}."
    return f"Slurm's job {name} is back in the queue, and will go on from there."


def _scontrol(*args: str) -> str:
    return subprocess.run(["scontrol", *args], capture_output=True, text=True, check=True, timeout=60).stdout
