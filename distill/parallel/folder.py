"""Checkpoints that are a folder, because every rank writes its part."""

import json
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from pytorch_lightning.strategies import Strategy

from distill import checkpoints
from distill.types import ConfigError, DistillError, TrainingError

NAME = "parts.json"


class Parts(NamedTuple):
    """What a folder says of itself.

    Attributes:
        kind: what wrote it, e.g. `ZeRO-2`.
        world_size: by how many ranks.
        names: of the tensors in the state dict that it holds.
    """

    kind: str
    world_size: int
    names: list[str]


class Background(ABC):
    """Does work while training goes on, one piece at a time; where `trainer.strategy.checkpoint_io` is one, folders are published by it."""

    @abstractmethod
    def later(self, work: Callable[[], None]) -> None:
        """Start work in another thread, once that of before is done; raises what kept that from being done."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all work is done, or raise what kept it from that, once."""


@contextmanager
def published(strategy: Strategy, target: Path, parts: Parts) -> Iterator[Path]:
    """Give the folder that all ranks shall write into; publish it when they have.

    Publishing takes longer than writing: every byte is synced to the disk and read twice for its sha256. It is rank 0's alone, and where
    the strategy has a `Background` it happens while training goes on; the folder has no manifest, so is no checkpoint, until its end.

    Args:
        strategy: of the trainer.
        target: the checkpoint, the same on every rank.
        parts: what it holds.

    Raises:
        TrainingError: the disk refuses, on any rank, now or for an earlier checkpoint that was being published; every rank raises it. What
            is published already stays.
    """
    temporary = checkpoints.beside(target)
    io = strategy.checkpoint_io
    with together(strategy, f"cannot save the checkpoint '{target}'", TrainingError):
        if strategy.is_global_zero:
            if isinstance(io, Background):
                io.wait()
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    with together(strategy, f"cannot save the checkpoint '{target}'", TrainingError):
        _wait_for(temporary)
    with together(strategy, f"cannot save the checkpoint '{target}'", TrainingError):
        yield temporary
        if strategy.is_global_zero:
            (temporary / NAME).write_text(json.dumps(parts._asdict()), encoding="utf-8")
    with together(strategy, f"cannot save the checkpoint '{target}'", TrainingError):
        if strategy.is_global_zero:
            publish = partial(_publish, temporary, target)
            io.later(publish) if isinstance(io, Background) else publish()


def _publish(temporary: Path, target: Path) -> None:
    try:
        checkpoints.publish(temporary, target)
    except OSError as error:  # it may be raised much later, beside another checkpoint
        raise TrainingError(f"cannot save the checkpoint '{target}': {error.strerror or error}") from error


def _wait_for(folder: Path, patience_s: float = 30.0) -> None:
    # a network filesystem may show a new folder to other machines seconds later
    end = time.monotonic() + patience_s
    while not folder.is_dir():
        if time.monotonic() > end:
            raise OSError(f"{socket.gethostname()} does not see the folder that rank 0 has made; --runs must be shared by all machines")
        time.sleep(0.2)


def opened(strategy: Strategy, path: str | Path) -> tuple[Path, Parts]:
    """Look at a checkpoint before it is read; all ranks read that of rank 0, which may have found another one than they.

    Raises:
        ConfigError: it is a file, incomplete or damaged.
    """
    path = Path(strategy.broadcast(str(path)))
    if path.is_file():
        raise ConfigError(f"the checkpoint '{path}' is a file, written by one process or DDP; go on with trainer.strategy=ddp or auto")
    io = strategy.checkpoint_io
    with together(strategy, f"cannot read the checkpoint '{path}'", ConfigError):
        if isinstance(io, Background):
            io.wait()
        damage = checkpoints.verify(path) if strategy.is_global_zero else None
        if damage:
            raise OSError(f"{damage}; take another one, or --ckpt_path last for the newest whole one")
        if not (path / NAME).is_file():
            raise OSError(f"it has no {NAME}, so it is not one of ours")
    return path, Parts(**json.loads((path / NAME).read_text(encoding="utf-8")))


def check_names(path: Path, saved: Iterable[str], wanted: Iterable[str], frozen: Iterable[str] = ()) -> None:
    """Compare the tensors of a checkpoint with those of the module.

    Args:
        path: for the message.
        saved: what it holds.
        wanted: what the module has.
        frozen: of these, what may be missing.

    Raises:
        ConfigError: they are not the same.
    """
    missing = sorted(set(wanted) - set(saved) - set(frozen))
    unknown = sorted(set(saved) - set(wanted))
    if missing or unknown:
        what = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it has {_some(unknown)}, unknown here"] * bool(unknown)
        raise ConfigError(
            f"the checkpoint '{path}' is of another student or other losses: {'; '.join(what)}. Resume with the model, the losses "
            "and the callbacks that it was made with"
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


@contextmanager
def together(strategy: Strategy, what: str, error_class: Callable[[str], Exception]) -> Iterator[None]:
    """Raise on every rank what one of them raises, so that none waits for it.

    Args:
        strategy: of the trainer.
        what: the beginning of the message.
        error_class: what to raise in place of an OSError, a RuntimeError, or an error for people, whose message stays as it is.
    """
    mine: Any = None
    try:
        yield
    except DistillError as error:
        mine = str(error)
    except (OSError, RuntimeError) as error:
        mine = f"{what}: {error.strerror or error if isinstance(error, OSError) else error}"
    everyone: list[str | None] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    if first := next((message for message in everyone if message), None):
        raise error_class(first)


def alone(strategy: Strategy, marker: Path, work: Callable[[], None], what: str, error_class: Callable[[str], Exception]) -> None:
    """Have rank 0 do what may take longer than a collective waits for, while the others look for a file that is gone when it is done.

    Their watchdogs go on, so that they end where rank 0 dies. All ranks must call.

    Args:
        strategy: of the trainer.
        marker: a file that there is not yet, where all ranks see it.
        work: for rank 0.
        what: as of `together`.
        error_class: as of `together`.
    """
    with together(strategy, what, error_class):
        if strategy.is_global_zero:
            marker.touch()
    with together(strategy, what, error_class):
        if strategy.is_global_zero:
            try:
                work()
            finally:
                marker.unlink(missing_ok=True)  # in place of writing one: this a full disk allows
        else:
            while marker.exists():
                time.sleep(0.2)


def names_only(state_dict: Iterable[str]) -> dict[str, None]:
    """A state dict's names, for what looks at `checkpoint["state_dict"]` after the strategy has loaded the tensors itself."""
    return dict.fromkeys(state_dict)
