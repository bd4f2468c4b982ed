"""The folders of runs: their names, their checkpoints, and what is done with one that is there already."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.utilities import rank_zero_only

from distill import checkpoints
from distill.types import ConfigError

NOT_THE_SAME = (
    "name",
    "alone",
    "baseline",
    "logger",
    "wandb_project",
    "wandb_artifact",
    "watchdog_s",
    "ckpt_path",
    "config",
    "save_every",
    "keep",
    "save_async",
    "dry_run",
    "report_rows",
    "tasks",
    "task_limit",
)


def default_name(config: Any) -> str:
    """Name a run after its config and the time; the same on every rank, and after a requeue, where a launcher gives an id."""
    stem = Path(str(config.config[0])).stem if config.get("config") else "run"
    if os.environ.get("WANDB_SWEEP_ID"):  # one agent starts many runs in one job, several in one second
        return f"{stem}-{os.environ['WANDB_RUN_ID']}"
    if job := os.environ.get("SLURM_JOB_ID"):
        step = os.environ.get("SLURM_STEP_ID", "0")  # a second srun in one allocation is another run
        return f"{stem}-{job}" if step == "0" else f"{stem}-{job}.{step}"
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic == "none":  # ranks and restarts would each take their own time
        raise ConfigError("torchrun has given this job no id; start it with --standalone or --rdzv-id, or give the run a --name")
    return f"{stem}-{elastic or os.environ.setdefault('DISTILL_STARTED', time.strftime('%Y%m%d-%H%M%S'))}"


def checkpoint(folder: Path, path: str | None) -> str | None:
    """Find the checkpoint that `last` means, see `newest`; or make sure that the one that is named is whole.

    Raises:
        ConfigError: there is none, or the one that is named is damaged.
    """
    if path == "last":
        if found := newest(folder):
            return found
        raise ConfigError(
            f"ckpt_path: no checkpoint in '{folder / 'checkpoints'}'; give one, or `last` with the --name of a run that has one"
        )
    if path and not Path(path).exists():
        raise ConfigError(f"ckpt_path: no checkpoint '{path}'; give one, or `last` with the --name of a run that has one")
    if path and _first_rank():
        _check_named(Path(path))
    return path


def newest(folder: Path) -> str | None:
    """Find the newest checkpoint of a run that is whole, or None; damaged ones are named on stderr.

    Rank 0 alone reads them; the others name the newest that was published, for rank 0's word counts when it is loaded
    (`AtomicCheckpointIO.load_checkpoint`). All look before any of them trains, so that none can be saving meanwhile.
    """
    folder = folder / "checkpoints"
    if not _first_rank():
        return next(map(str, checkpoints.published(folder)), None)
    damaged: list[str] = []
    found = checkpoints.newest_good(folder, lambda path, why: damaged.append(f"damaged checkpoint {path}: {why}"))
    for line in damaged:
        print(f"{line}; {f'{found} is used instead' if found else 'no other is whole'}", file=sys.stderr)
    return str(found) if found else None


def _first_rank() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning reads it from the launcher's variables when it is imported


def _check_named(path: Path) -> None:
    if not checkpoints.manifest_of(path).exists():
        print(f"{path} has no manifest {checkpoints.manifest_of(path).name}: used without knowing whether it is whole", file=sys.stderr)
    elif damage := checkpoints.verify(path):
        raise ConfigError(f"ckpt_path: {path} is damaged: {damage}; take another, or `last` for the newest that is whole")


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
    if checkpoints.published(folder / "checkpoints"):
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
