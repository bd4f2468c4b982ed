"""Stores of the tiny pair's teacher, written by `distill.report.sources.caching` as the verb does."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from distill.data.base import DistillData
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.report.sources import caching
from distill.teachers.cached import CachedTeacher
from distill.teachers.online import OnlineTeacher
from tests import pair


def cached(tmp_path: Path, store: str = "store", model: str = "teacher", **kept: Any) -> CachedTeacher:
    """The teacher of a store in `tmp_path`, that of the pair behind it."""
    return CachedTeacher(str(tmp_path / store), source=OnlineTeacher(str(tmp_path / model)), **kept)


def job(teacher: CachedTeacher, data: DistillData, module: DistillModule, fabric: Any = None, batch_size: int = 4) -> caching.Job:
    """Ready everything for writing, on one rank unless `fabric` has more."""
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    assert teacher.source is not None
    caching.ready(module, teacher, teacher.source, data, torch.float32, fabric)
    return caching.Job(teacher, teacher.source, data, fabric, batch_size)


def written(tmp_path: Path, data: DistillData | None = None, losses: Any = None, shard_rows: int = 16, **kept: Any) -> CachedTeacher:
    """Write a store for these losses (default: hard labels), and give a teacher that has not opened it yet."""
    data, teacher = data or pair.data(tmp_path), cached(tmp_path, **kept)
    module = pair.module(tmp_path, losses=losses or {"ce": CrossEntropy()}, teacher=None if losses is None else teacher, balancer=None)
    ready = job(teacher, data, module)
    caching.write(ready, caching.taps_of(module, teacher, data), shard_rows)
    return cached(tmp_path, **kept)
