"""How a checkpoint file gets to the disk and back: nothing can tear it, and it can be written while training goes on."""

import copy
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, distributed
from torch.utils import _pytree

from distill import checkpoints
from distill.parallel.folder import Background
from distill.types import ConfigError, TrainingError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save so that the path holds either the previous whole checkpoint or the new whole one, at any instant; see `checkpoints.publish`.

    The sha256 of the manifest is that of the bytes on their way to the disk, and the file is read back and compared with it. Lightning's
    own goes through `$TMPDIR` and does not fsync. A path with a scheme, such as `s3://…`, is left to Lightning: object stores show an
    object only when it is whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint and publish it.

        Args:
            checkpoint: what `torch.save` is given.
            path: the file; its folder is made if need be.
            storage_options: must be None.

        Raises:
            TypeError: `storage_options` is given.
            TrainingError: the disk refuses; the previous file at `path` is as it was, and no temporary file is left.
        """
        self._refuse(storage_options)
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path)
        target = Path(path)
        temporary = checkpoints.beside(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.publish(temporary, target, _write(checkpoint, temporary))
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise TrainingError(_refused(target, error)) from error
            raise

    def _refuse(self, storage_options: Any | None) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}; leave it out")

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, _location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint with `torch.load`; of several ranks, all read the one that rank 0 was given.

        Each rank has looked for the newest checkpoint by itself, before it could talk to the others, and a network filesystem may show
        a new file to one machine later than to another.

        Args:
            path: the file.
            map_location: where tensors go; by default they stay on the CPU.
            weights_only: as for `torch.load`; None is torch's own default.

        Raises:
            ConfigError: the file is missing, unreadable or torn, or holds objects that the safe loader refuses.
        """
        path = _of_rank_zero(path)
        if Path(path).is_dir():
            raise ConfigError(
                f"the checkpoint '{path}' is a folder, which several ranks have written under DeepSpeed or FSDP2; go on with the "
                "trainer.strategy that it is of"
            )
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except FileNotFoundError as error:
            raise ConfigError(f"no checkpoint '{path}'; {_others(Path(path))}") from error
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"cannot read checkpoint '{path}': {_reason(path, error)}") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint with its manifest."""
        if "://" in str(path):
            return super().remove_checkpoint(path)
        checkpoints.delete(Path(path))

    def wait(self) -> None:
        """Return when all that was saved is published."""


class AsyncCheckpointIO(AtomicCheckpointIO, Background):
    """Write while training goes on: a save takes as long as a copy to the memory of the CPU, unless the one before is still being written.

    Costs the memory of one copy of the checkpoint. Of a checkpoint that is a folder the ranks write their parts at once, without a copy;
    what is done meanwhile is syncing, hashing and the manifest, see `parallel.folder.published`. In place of Lightning's class of this
    name, which lets any number of copies wait, keeps them on the GPU, makes two tensors of one that is tied, and tells an error one save
    too late.

    Errors are those of `AtomicCheckpointIO`, raised by the next save, by `wait`, or by `teardown`.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy a checkpoint and let a thread write and publish it; arguments and errors as of `AtomicCheckpointIO`."""
        self._refuse(storage_options)
        self.wait()  # before there is another copy
        self.later(partial(super().save_checkpoint, snapshot(checkpoint), path))

    def later(self, work: Callable[[], None]) -> None:
        """Let the thread do work."""
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(work)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint when all that was saved is published."""
        self.wait()
        return super().load_checkpoint(*args, **kwargs)

    def wait(self) -> None:
        """Return when all that was saved is published, or raise what kept it from that, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        """Wait, and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
        self.wait()


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Copy a checkpoint to the memory of the CPU, whatever is changed in the original afterwards; tensors that share memory still do."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for leaf in _pytree.tree_leaves(checkpoint):
        if isinstance(leaf, Tensor):
            source = leaf.untyped_storage()
            if source.data_ptr() not in storages:
                storages[source.data_ptr()] = source.clone() if source.device.type == "cpu" else source.cpu()
            place = torch.empty(0, dtype=leaf.dtype)
            copies[id(leaf)] = place.set_(storages[source.data_ptr()], leaf.storage_offset(), leaf.size(), leaf.stride())
    return copy.deepcopy(checkpoint, copies)  # it takes what is in its memo for copied already


class _Hashing:
    """A file that is hashed while it is written, and keeps the first error for later.

    torch's writer, told in the middle, raises about itself while it cleans up: "unexpected pos 64 vs 0".
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        self.hash.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""


def _write(checkpoint: dict[str, Any], path: Path) -> str:
    with path.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # it asks for no more than write and flush
        if hashing.error is not None:
            raise hashing.error
        file.flush()
        os.fsync(file.fileno())
    return hashing.hash.hexdigest()


def _refused(target: Path, error: OSError) -> str:
    good = checkpoints.latest(target.parent)
    before = f"the one before, {good}, is as it was" if good and good != target else "there is none before it"
    return (
        f"cannot write checkpoint '{target}': {error.strerror or error}; {before}. Make room on the disk and resume with --ckpt_path last"
    )


def _of_rank_zero(path: str | Path) -> str | Path:
    if not (distributed.is_available() and distributed.is_initialized()):
        return path
    paths = [path]
    distributed.broadcast_object_list(paths, src=0)
    return paths[0]


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return "it holds more than tensors and plain values; pass weights_only=False if you trust whoever wrote it"
    # torch's message for a file of another kind advises to switch its safety off
    known = isinstance(error, OSError | RuntimeError) and str(error)
    what = known.split("\n")[0] if known else "it is empty or not in torch's format"
    return f"{what}; the file is torn or no checkpoint; {_others(Path(path))}"


def _others(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.ckpt") if p.name != path.name)
    if not names:
        return "give the path of a checkpoint, or leave it out to start anew"
    return f"in '{path.parent}' there are {', '.join(names[-5:])}"
