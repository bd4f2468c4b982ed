"""Checkpoints on disk, files and folders alike: published whole, proven to be whole, found again.

Beside `step-00000100.ckpt` lies its manifest `step-00000100.ckpt.sha256`, in the format of `sha256sum -c`. Neither `torch.load` nor
safetensors notices a flipped byte, and a folder that was written by half looks like a whole one: the manifest is what says so.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

LINE = re.compile(r"([0-9a-f]{64})  (.+)")
NAME = re.compile(r"step-(\d+)\.ckpt")
LATEST = "latest"
LEFT = "left"


def name_of(step: int) -> str:
    """The name of the checkpoint after so many optimizer steps."""
    return f"step-{step:08}.ckpt"


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint lies."""
    return path.with_name(f"{path.name}.sha256")


def beside(target: Path) -> Path:
    """Where to write what shall become `target`: on its filesystem, so that it can be renamed, and under no checkpoint's name."""
    return target.with_name(f".{target.name}.tmp")


def publish(temporary: Path, target: Path, digest: str | None = None) -> None:
    """Put a written file or folder in its place, with its manifest, and let `latest` name it once it was read back.

    Everything is synced; the file or folder is renamed, then its manifest, then `latest`. A process that is killed at any point leaves
    the earlier checkpoints as they were, and of this one either nothing that `newest_good` takes, or all of it. Later steps, which the
    run has left behind by going on from an earlier one, move to the folder `left`. To be called by one process of a run, after all that
    write have ended.

    Args:
        temporary: the written file or folder, on the filesystem of `target`, e.g. `beside(target)`; not there any more afterwards.
        target: the checkpoint; one of the same name is replaced.
        digest: sha256 of the bytes that were meant, where known, of a file; else those on the disk are taken for it.

    Raises:
        OSError: the disk refuses, or gives back something else than was written; `latest` is as it was.
    """
    _sync(temporary)
    found = {"": digest} if digest else _digests(temporary)
    lines = [f"{found[name]}  {target.name}{name}\n" for name in sorted(found)]
    manifest_of(target).unlink(missing_ok=True)  # it would call the new target damaged, should a kill come before the new manifest
    _replace(temporary, target)
    _write(manifest_of(target), "".join(lines))
    if damage := verify(target):
        raise OSError(errno.EIO, f"what was written was read back differently: {damage}", str(target))
    _write(target.with_name(LATEST), f"{target.name}\n")
    _leave_behind(target)


def verify(path: Path) -> str | None:
    """Read a checkpoint and say what is damaged, or None where it is whole.

    Reads every byte in pieces of 256 kB, the files of a folder in up to 8 threads. A file that is in the folder and not in the manifest
    is no damage.
    """
    manifest = manifest_of(path)
    if not path.exists():
        return "it is not there"
    if not manifest.exists():
        return f"it has no {manifest.name}, which is written last"
    try:
        expected = _parse(manifest.read_text(encoding="utf-8"), path.name)
        missing = [name for name in expected if not (path.parent / name).is_file()]
        found = _digests(path) if not missing else {}
    except (OSError, ValueError) as error:
        return f"{manifest.name if isinstance(error, ValueError) else 'it'} cannot be read: {error}"
    bad = missing or [name for name in expected if found[name.removeprefix(path.name)] != expected[name]]
    if not bad:
        return None
    return f"{bad[0]} {'is not there' if missing else 'has other bytes than were written'}" + (
        f", and {len(bad) - 1} more" * (len(bad) > 1)
    )


def candidates(folder: Path) -> list[Path]:
    """All checkpoints in a folder by step, newest first, whole or not."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def published(folder: Path) -> list[Path]:
    """Those of them that have a manifest, newest first, without reading them."""
    return [path for path in candidates(folder) if manifest_of(path).exists()]


def newest_good(folder: Path, tell: Callable[[Path, str], object] = lambda path, damage: None) -> Path | None:
    """Find the checkpoint of the highest step that is whole; None where there is none.

    Args:
        folder: of the checkpoints; may be missing.
        tell: is called with each damaged one that is passed over, and what is damaged.
    """
    for path in candidates(folder):
        if (damage := verify(path)) is None:
            return path
        tell(path, damage)
    return None


def latest(folder: Path) -> Path | None:
    """The checkpoint that was published last, without reading it; None where none was."""
    with suppress(OSError, ValueError):
        path = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
        return path if manifest_of(path).exists() else None
    return None


def retire(folder: Path, keep: int) -> None:
    """Delete old checkpoints: of those before `latest`, all but the `keep − 1` newest.

    `latest` was verified when it was published and is never deleted, so that the last good one always stays.

    Args:
        folder: of the checkpoints.
        keep: ≥ 1, how many stay.
    """
    newest = latest(folder)
    older = [path for path in published(folder) if newest and path.name < newest.name]
    for path in older[keep - 1 :]:
        delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint; the manifest first, so that a kill in between leaves nothing that passes for whole."""
    manifest_of(path).unlink(missing_ok=True)
    _remove(path)


def sweep(folder: Path) -> None:
    """Delete what killed processes have left half-written. Only while nothing writes here."""
    for path in folder.glob(".*.tmp"):
        _remove(path)


def _leave_behind(target: Path) -> None:
    ahead = [path for path in candidates(target.parent) if NAME.fullmatch(target.name) and path.name > target.name]
    for path in ahead:
        left = target.parent / LEFT / path.name
        left.parent.mkdir(exist_ok=True)
        delete(left)
        os.replace(path, left)
        with suppress(FileNotFoundError):
            os.replace(manifest_of(path), manifest_of(left))


def _files(path: Path) -> dict[str, Path]:
    """The files of a checkpoint by what follows its name: "" for a file, "/a/b" in a folder."""
    if not path.is_dir():
        return {"": path}
    return {f"/{file.relative_to(path).as_posix()}": file for file in path.rglob("*") if file.is_file()}


def _digests(path: Path) -> dict[str, str]:
    files = _files(path)
    if not files:
        raise FileNotFoundError(errno.ENOENT, "the folder holds no file", str(path))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(_digest, files.values()), strict=True))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parse(text: str, name: str) -> dict[str, str]:
    lines = [LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    expected = {line[2]: line[1] for line in lines if line and (line[2] == name or line[2].startswith(f"{name}/"))}
    if len(expected) != len(lines) or not text.endswith("\n"):
        raise ValueError("it is damaged itself")
    return expected


def _sync(path: Path) -> None:
    for file in _files(path).values():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if path.is_dir():
        for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
            _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    # some network filesystems refuse to fsync a folder, and need not
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(temporary: Path, target: Path) -> None:
    if temporary.is_dir() or target.is_dir():  # neither can be renamed over the other
        _remove(target)
    os.replace(temporary, target)
    _sync_folder(target.parent)


def _write(path: Path, text: str) -> None:
    temporary = beside(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
