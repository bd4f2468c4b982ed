"""`cache`: a teacher's targets for the training rows, written to disk once; training then holds no teacher."""

from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from pytorch_lightning.cli import LightningArgumentParser

from distill import cluster, folders
from distill.module import DistillModule
from distill.report.sources import caching
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.store import read_header, verify
from distill.types import ConfigError, DataError
from distill.verb import Verb

PATIENCE = timedelta(days=30)  # the ranks meet at the end only, and one may have had the longer rows


class Cache(Verb):
    """Asks the teacher behind a `CachedTeacher` about every row, and writes what it says."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the store."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--store", type=str | None, default=None, help="folder of the store (default: model.teacher.store)")
        parser.add_argument(
            "--batch", type=PositiveInt | None, default=None, help="rows the teacher takes at a time (default: validation's)"
        )
        parser.add_argument("--shard_rows", type=PositiveInt | None, default=None, help="rows of a shard (default: by their size)")
        parser.add_argument("--verify", action="store_true", help="only read every byte of the store, and say what is damaged")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make what runs the teacher on each rank, in place of a trainer."""
        trainer = self.config_init[self.subcommand].trainer
        given = cluster.settle({"devices": trainer.devices, "num_nodes": trainer.num_nodes, "plugins": []})
        make = partial(Fabric, accelerator=trainer.accelerator, precision=trainer.precision, **given)
        alone = make()
        if alone.world_size == 1:
            return alone
        return make(strategy=DDPStrategy(process_group_backend="gloo", timeout=PATIENCE))  # the ranks share rows out, and no tensors

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Write, or verify."""
        cached = module.teacher
        if not isinstance(cached, CachedTeacher):
            raise ConfigError(
                f"model.teacher is {type(cached).__name__ if cached else 'missing'}, of which nothing is kept; set class_path: "
                "CachedTeacher, and this teacher as its init_args.source"
            )
        cached.keep_in(config.store or str(cached.folder))
        if config.verify:
            look_at(cached)
            return
        if cached.source is None:
            raise ConfigError("model.teacher.source is missing: there is no teacher to ask; give one, e.g. class_path: OnlineTeacher")
        self._make(module, cached.source)
        fabric: Any = self.trainer
        fabric.launch()
        with folders.locked(cached.folder) if fabric.is_global_zero else nullcontext():
            fabric.barrier()
            self._write(module, cached, cached.source, data, config)

    def _make(self, module: DistillModule, source: Teacher) -> None:
        module.teacher = source  # whom the recipe is for
        while recipe := source.recipe_needed():
            self._make_teacher(recipe)

    def _write(self, module: DistillModule, cached: CachedTeacher, source: Teacher, data: Any, config: Any) -> None:
        half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(config.trainer.precision).partition("-")[0], torch.float32)
        fabric: Any = self.trainer
        caching.ready(module, cached, source, data, half, fabric)
        taps = fabric.broadcast(caching.taps_of(module, cached, data) if fabric.is_global_zero else [])
        job = caching.Job(cached, source, data, fabric, config.batch or data.val_batch_size)
        caching.write(job, taps, config.shard_rows)


def look_at(cached: CachedTeacher) -> None:
    """Say whether a store is whole.

    Raises:
        ConfigError: it is not there, or not finished.
        DataError: it is damaged; the message names every shard.
    """
    cached.recipe_needed()
    header = read_header(cached.folder)
    if damaged := [what for _, what in verify(cached.folder)]:
        raise DataError("\n".join(damaged))
    print(f"The store {cached.folder} is whole: {header.num_shards} shards with {header.rows:,} rows of {header.teacher}")
