"""The folders of runs: their names, their checkpoints, and what is done with one that is there already."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from distill.types import ConfigError

NOT_THE_SAME = ("name", "alone", "baseline", "logger", "wandb_project", "ckpt_path", "config", "save_every", "dry_run")


def default_name(config: Any) -> str:
    """Name a run after its config and the time; the same on every rank, and after a requeue, where a launcher gives an id."""
    stem = Path(str(config.config[0])).stem if config.get("config") else "run"
    if job := os.environ.get("SLURM_JOB_ID"):
        step = os.environ.get("SLURM_STEP_ID", "0")  # a second srun in one allocation is another run
        return f"{stem}-{job}" if step == "0" else f"{stem}-{job}.{step}"
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{stem}-{os.environ.setdefault('DISTILL_STARTED', time.strftime('%Y%m%d-%H%M%S')) if elastic == 'none' else elastic}"


def checkpoint(folder: Path, path: str | None) -> str | None:
    """Find the checkpoint that `last` means, and make sure that what is named is there.

    Raises:
        ConfigError: it is not.
    """
    found = str(folder / "checkpoints" / "last.ckpt") if path == "last" else path
    if found and not Path(found).is_file():
        raise ConfigError(f"ckpt_path: no checkpoint '{found}'; give a file, or `last` with the --name of a run that has one")
    return found


def of_recipe(path: str) -> Path:
    """The folder that a recipe's run will have: a recipe has a fixed name.

    Raises:
        ConfigError: it has none.
    """
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not config.get("name"):
        raise ConfigError(f"the recipe {path} has no `name`; give it one, so that model.teacher.model can point to runs/NAME/student")
    return Path(config.get("runs", "runs")) / str(config["name"])


def resume_or_start(folder: Path) -> list[str]:
    """Arguments for a run that may have been interrupted: go on from its checkpoint; without one, move what is there aside."""
    if (folder / "checkpoints" / "last.ckpt").is_file():
        return ["--ckpt_path=last"]
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.interrupted-{time.strftime('%Y%m%d-%H%M%S')}"))
    return []


def check_same(folder: Path, text: str) -> None:
    """Make sure that a finished run has the configuration `text`, but for its name and the like.

    Raises:
        ConfigError: it has another; the message names the first key.
    """
    theirs, ours = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), yaml.safe_load(text)
    for key in sorted(set(theirs) | set(ours)):
        if key not in NOT_THE_SAME and theirs.get(key) != ours.get(key):
            raise ConfigError(f"{folder} is the baseline of another configuration (`{key}` differs); delete it, or take another --name")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock beside a folder; a second process waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
