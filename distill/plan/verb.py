"""What `distill plan` prints."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from distill.data.base import DistillData
from distill.module import DistillModule
from distill.plan import speed
from distill.plan.describe import describe
from distill.plan.measure import MicroStep, seconds_of
from distill.plan.table import Cluster, communication_table, memory_table, rows
from distill.report import tables
from distill.teachers.cached import CachedTeacher
from distill.types import ConfigError


def show(module: DistillModule, data: DistillData, config: Any, strategy: str, recipe: Callable[[str], tuple[DistillModule, Any]]) -> None:
    """Print memory, communication and speed of a run.

    Args:
        module: as the YAML makes it.
        data: the same.
        config: the resolved configuration, with the keys of `options`.
        strategy: `trainer.strategy`.
        recipe: parses the config that makes the teacher.

    Raises:
        ConfigError: a model's configuration cannot be read, or a number is out of range.
    """
    cluster = Cluster(config.nodes or config.trainer.num_nodes, config.gpus or _devices(config), config.gpu_memory, config.bandwidth)
    for name, value in (("gpu_memory", config.gpu_memory), ("tflops", config.tflops), ("mfu", config.mfu), ("bandwidth", config.bandwidth)):
        if not value > 0:
            raise ConfigError(f"{name} must be > 0, got {value}")
    described = describe(module, data, config, recipe)
    job = replace(described.job, teacher_sharded=config.teacher_sharded)
    steps = config.trainer.max_steps if config.trainer.max_steps > 0 else None
    found = speed.estimated(job, cluster.ranks, steps, config.tflops, config.mfu)
    if config.measure and isinstance(module.teacher, CachedTeacher):
        raise ConfigError("--measure runs a teacher in memory, but model.teacher is a store; leave it out")
    if config.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        here = describe(module, data, config, recipe, device)
        seconds = seconds_of(MicroStep(here, module.recipe_of_student), device)
        found = speed.scaled(job, cluster.ranks, steps, seconds, torch.cuda.get_device_name() if device == "cuda" else "this CPU")
    tables.show(tables.banner("Plan", rows(job, cluster, found, steps)))
    tables.show(memory_table(job, cluster, strategy))
    if cluster.ranks > 1:
        tables.show(communication_table(job, cluster))


def _devices(config: Any) -> int:
    devices = config.trainer.devices
    count = len(devices) if isinstance(devices, list) else len(str(devices).split(",")) if "," in str(devices) else devices
    return int(count) if str(count).isdecimal() else 1  # `auto` and -1 mean what is found where it runs
