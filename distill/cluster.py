"""The trainer's place in a Slurm job: how many processes there are, who has started them, and that both say the same."""

import os
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from distill import slurm
from distill.types import ConfigError


def settle(trainer: dict[str, Any]) -> dict[str, Any]:
    """Give the trainer's arguments with devices, nodes and the cluster environment of the Slurm job; outside of one as they are.

    Under srun each task is one process on one device. `devices: auto` and `num_nodes: 1`, the defaults, become what Slurm has started.
    Lightning's own detection is not left to choose: it is off for jobs named bash or interactive, where several tasks would each train
    alone, and its requeuing deadlocks.

    Args:
        trainer: the arguments; `plugins` is a list.

    Raises:
        ConfigError: the tasks are not what the trainer was told, or the other tasks of the job were never started.
    """
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in trainer["plugins"])
    if chosen or "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return trainer
    if int(os.environ["SLURM_NTASKS"]) > 1 and not slurm.by_srun():
        raise ConfigError(
            f"Slurm has {os.environ['SLURM_NTASKS']} tasks for this job, but srun has not started this process, which would wait for the "
            "others for ever; write `srun python train.py …`, or `srun --ntasks=1 python train.py …` for one process"
        )
    if not slurm.by_srun() or _in_a_shell():  # one process, which may start others on this node itself
        return trainer | {"plugins": [*trainer["plugins"], LightningEnvironment()]}
    tasks, nodes = slurm.tasks_and_nodes()
    devices = trainer.get("devices", "auto")
    check(devices, trainer.get("num_nodes", 1), tasks, nodes, "Slurm has started", "--ntasks-per-node")
    # Lightning reads it; `srun --ntasks` leaves it out, and a step of fewer tasks than its job still sees the job's
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks)
    return trainer | {
        "devices": tasks if _count(devices) is None else devices,
        "num_nodes": nodes,
        "plugins": [*trainer["plugins"], SLURMEnvironment(auto_requeue=False)],
    }


def check(devices: Any, num_nodes: int, tasks: int | None, nodes: int | None, who: str, option: str) -> None:
    """Make sure that the trainer and the job have the same tasks and nodes; `auto` devices and 1 node, the defaults, agree with any.

    Args:
        devices: `trainer.devices`.
        num_nodes: `trainer.num_nodes`.
        tasks: of the job, on each node; None where it does not say.
        nodes: of the job; None where it does not say.
        who: of the message, what says so.
        option: of the message, what sets the tasks.

    Raises:
        ConfigError: they are not; the message has both values.
    """
    count = _count(devices)
    if None not in (count, tasks) and count != tasks:
        raise ConfigError(
            f"trainer.devices is {count}, but {who} {tasks} tasks on each node; "
            f"set trainer.devices={tasks}, or leave it out, or use {option}={count}"
        )
    if nodes is not None and num_nodes not in (1, nodes):
        raise ConfigError(
            f"trainer.num_nodes is {num_nodes}, but {who} tasks on {nodes} nodes; "
            f"set trainer.num_nodes={nodes}, or leave it out, or use --nodes={num_nodes}"
        )


def _in_a_shell() -> bool:
    return os.environ["SLURM_NTASKS"] == "1" and SLURMEnvironment.job_name() in ("bash", "interactive")


def _count(devices: Any) -> int | None:
    """How many devices the trainer was told; None where that was left to it."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return None
    return len([part for part in devices.split(",") if part]) if "," in str(devices) else int(devices)
