"""Checkpoints that a kill, a full disk or a power cut cannot tear."""

import contextlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from distill.types import ConfigError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save so that the path holds either the previous whole checkpoint or the new whole one, at any instant.

    Write a temporary file beside the target, fsync it, rename it over the target, fsync the folder. The rename is atomic only
    within one filesystem, hence beside: Lightning's own goes through `$TMPDIR` and does not fsync. A path with a scheme, such
    as `s3://…`, is left to Lightning: object stores show an object only when it is whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what `torch.save` is given.
            path: the file; its folder is made if need be.
            storage_options: must be None.

        Raises:
            TypeError: `storage_options` is given.
            OSError: the disk refuses; the previous file at `path` is as it was, and no temporary file is left.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}; leave it out")
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # not *.ckpt: what a SIGKILL leaves behind must never be found by a search for the last checkpoint
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, _location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint with `torch.load`.

        Args:
            path: the file.
            map_location: where tensors go; by default they stay on the CPU.
            weights_only: as for `torch.load`; None is torch's own default.

        Raises:
            ConfigError: the file is missing, unreadable or torn, or holds objects that the safe loader refuses.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except FileNotFoundError as error:
            raise ConfigError(f"no checkpoint '{path}'; {_others(Path(path))}") from error
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"cannot read checkpoint '{path}': {_reason(path, error)}") from error


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return "it holds more than tensors and plain values; pass weights_only=False if you trust whoever wrote it"
    # torch's message for a file of another kind advises to switch its safety off
    known = isinstance(error, OSError | RuntimeError) and str(error)
    what = known.split("\n")[0] if known else "it is empty or not in torch's format"
    return f"{what}; the file is torn or no checkpoint; {_others(Path(path))}"


def _sync_folder(folder: Path) -> None:
    # the file is whole and in place by now; some network filesystems refuse to fsync a folder, and need not
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _others(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.ckpt") if p.name != path.name)
    if not names:
        return "give the path of a checkpoint, or leave it out to start anew"
    return f"in '{path.parent}' there are {', '.join(names[-5:])}"
