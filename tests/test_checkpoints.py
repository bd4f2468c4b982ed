"""Files and folders on disk: what is damaged is noticed, and whatever goes wrong, the one before is there."""

import os
import random
import signal
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill import checkpoints
from distill.checkpoints import beside, candidates, latest, manifest_of, name_of, newest_good, publish, retire, sweep, verify
from tests.disk import disk, largest_file

CONTENT = random.Random(0).randbytes(20_000)
KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


def write(path: Path, kind: str, content: bytes = CONTENT) -> None:
    """Write a checkpoint as a strategy would: one file, or one per rank beside what they share."""
    if kind == "file":
        path.write_bytes(content)
        return
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    for rank in range(3):
        (path / "checkpoint" / f"rank {rank}.pt").write_bytes(content[rank :: 3 + rank])


def save(folder: Path, step: int, kind: str = "file", content: bytes = CONTENT) -> Path:
    folder.mkdir(exist_ok=True)
    target = folder / name_of(step)
    write(beside(target), kind, content)
    publish(beside(target), target)
    return target


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << bit]))


@KINDS
def test_published_is_whole_named_and_leaves_nothing_beside(tmp_path: Path, kind: str) -> None:
    for step in (5, 100):
        target = save(tmp_path, step, kind)
        assert verify(target) is None
        assert latest(tmp_path) == newest_good(tmp_path) == target
    names = [name_of(5), f"{name_of(5)}.sha256", name_of(100), f"{name_of(100)}.sha256", "latest"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert (tmp_path / "latest").read_text() == "step-00000100.ckpt\n"


@KINDS
def test_the_manifest_is_what_sha256sum_reads(tmp_path: Path, kind: str) -> None:
    target = save(tmp_path, 1, kind)
    done = subprocess.run(["sha256sum", "--strict", "-c", manifest_of(target).name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("OK") == len(files(target)) == (1 if kind == "file" else 4)


@KINDS
def test_two_hundred_flipped_bits_are_all_noticed(tmp_path: Path, kind: str) -> None:
    before, target = save(tmp_path, 1, kind), save(tmp_path, 2, kind)
    rng = random.Random(1)
    for i in range(200):
        file = manifest_of(target) if i % 10 == 0 else rng.choice(files(target))
        at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, at, bit)
        assert verify(target), (file, at, bit)
        if i % 20 == 0:
            told: list[tuple[Path, str]] = []
            assert newest_good(tmp_path, lambda path, why, told=told: told.append((path, why))) == before
            assert [path for path, _ in told] == [target]
        flip(file, at, bit)
    assert verify(target) is None


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    folder, file = save(tmp_path, 1, "folder"), save(tmp_path, 2)
    flip(file, 7, 0)
    assert verify(file) == "step-00000002.ckpt has other bytes than were written"
    manifest_of(file).unlink()
    assert verify(file) == "it has no step-00000002.ckpt.sha256, which is written last"
    (folder / "checkpoint" / "rank 1.pt").unlink()
    assert verify(folder) == "step-00000001.ckpt/checkpoint/rank 1.pt is not there"
    (folder / "latest").unlink()
    assert verify(folder) == "step-00000001.ckpt/checkpoint/rank 1.pt is not there, and 1 more"
    assert verify(tmp_path / "no.ckpt") == "it is not there"
    manifest_of(folder).write_bytes(b"\xff\n")
    assert "step-00000001.ckpt.sha256 cannot be read" in str(verify(folder))
    assert newest_good(tmp_path) is None
    assert newest_good(tmp_path / "nowhere") is None
    assert latest(tmp_path / "nowhere") is None


def test_a_manifest_of_another_checkpoint_or_of_nothing_proves_nothing(tmp_path: Path) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    manifest_of(two).write_text(manifest_of(one).read_text())
    assert verify(two)
    manifest_of(two).write_text("")
    assert verify(two)
    manifest_of(two).write_text("0" * 64 + "  step-00000002.ckpt/../../secret\n")
    assert verify(two)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_checkpoint_that_may_not_be_read_is_passed_over(tmp_path: Path) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    two.chmod(0)
    assert newest_good(tmp_path) == one


def calls_of(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[str]:
    """The calls to the disk that decide, in their order."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        calls.append(f"fsync {name}")
        fsync(handle)

    def watch_replace(source: Path, target: Path) -> None:
        calls.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    act()
    monkeypatch.undo()
    return calls


def test_each_step_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, lambda: save(tmp_path, 1))
    name, here = name_of(1), f"fsync {tmp_path.name}"
    manifest = [f"fsync .{name}.sha256.tmp", f"rename {name}.sha256", here]
    assert calls == [f"fsync .{name}.tmp", f"rename {name}", here, *manifest, "fsync .latest.tmp", "rename latest", here]
    calls = calls_of(monkeypatch, lambda: save(tmp_path, 2, "folder"))
    before = calls[: calls.index(f"rename {name_of(2)}")]
    wanted = {"rank 0.pt", "rank 1.pt", "rank 2.pt", "latest", "checkpoint", f".{name_of(2)}.tmp"}
    assert {call.removeprefix("fsync ") for call in before} == wanted


@KINDS
def test_a_kill_before_any_call_to_the_disk_leaves_the_one_before_or_the_new_one(tmp_path: Path, kind: str) -> None:
    """Counts the calls that change the disk, and dies at each of them in turn; a step that is saved again replaces what is there."""
    found: list[str] = []
    for at in range(30):
        folder = tmp_path / str(at)
        for step in (1, 2):
            save(folder, step, kind)
        if (child := os.fork()) == 0:
            die_at(at)
            save(folder, 2 if at % 2 else 3, kind, CONTENT[::-1])
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        good = newest_good(folder)
        assert good is not None
        found.append(good.name)
        assert good.name != name_of(1) or at % 2, "only a checkpoint that is replaced may fall back further than the one before"
        newest = verify(candidates(folder)[0])
        assert kind == "folder" or newest is None or newest.startswith("it has no step-"), "a file is never half replaced"
        sweep(folder)
        assert not list(folder.glob(".*"))
        assert save(folder, 4, kind) == newest_good(folder), "what a kill has left does not stand in the way"
        if ended == 0:
            break
    else:
        pytest.fail("30 calls were not enough")
    assert {name_of(1), name_of(2), name_of(3)} >= set(found) >= {name_of(2), name_of(3)}


def die_at(count: int) -> None:
    """Let this process be killed in place of the `count`-th fsync, rename or deletion."""
    left = [count]

    def lethal(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "unlink", "rmdir"):
        setattr(os, name, lethal(getattr(os, name)))


def test_what_the_disk_gives_back_differently_is_not_published(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    target = tmp_path / name_of(2)
    beside(target).write_bytes(CONTENT)
    with pytest.raises(OSError, match=r"read back differently: step-00000002\.ckpt has other bytes"):
        publish(beside(target), target, digest="0" * 64)
    assert latest(tmp_path) == newest_good(tmp_path) == before


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    beside(tmp_path / name_of(1)).mkdir()
    with pytest.raises(OSError, match="holds no file"):
        publish(beside(tmp_path / name_of(1)), tmp_path / name_of(1))
    assert not candidates(tmp_path)


@KINDS
def test_the_newest_stay(tmp_path: Path, kind: str) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, kind)
    (tmp_path / name_of(0)).write_text("copied here by hand: nobody's to delete")
    retire(tmp_path, 2)
    assert [path.name for path in candidates(tmp_path)] == [name_of(4), name_of(3), name_of(0)]
    retire(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", name_of(0), name_of(4), f"{name_of(4)}.sha256"]
    assert newest_good(tmp_path) == tmp_path / name_of(4)


def test_nothing_is_deleted_for_one_that_was_not_published(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / name_of(2)).write_bytes(CONTENT)
    retire(tmp_path, 1)
    assert newest_good(tmp_path) == tmp_path / name_of(1)
    (tmp_path / "latest").write_text("step-00000002.ckpt\n")
    retire(tmp_path, 1)
    assert newest_good(tmp_path) == tmp_path / name_of(1)


@KINDS
def test_steps_that_the_run_has_left_behind_are_put_aside_whole(tmp_path: Path, kind: str) -> None:
    for _ in range(2):  # twice: what is aside already is replaced
        for step in (100, 200, 150):
            save(tmp_path, step, kind)
        assert newest_good(tmp_path) == latest(tmp_path) == tmp_path / name_of(150)
        assert verify(tmp_path / "left" / name_of(200)) is None
    retire(tmp_path, 1)
    assert verify(tmp_path / name_of(150)) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", "64k") as folder:
        yield folder


@KINDS
def test_a_full_disk_leaves_the_one_before(small_disk: Path, kind: str) -> None:
    before = save(small_disk, 1, kind)
    ballast = small_disk / "ballast"
    room = os.statvfs(small_disk)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize))
    target = small_disk / name_of(2)
    with pytest.raises(OSError, match="No space left"):
        write(beside(target), kind)
    sweep(small_disk)
    ballast.write_bytes(bytes(ballast.stat().st_size - 4096))  # a page: room for a checkpoint, but not for its manifest
    write(beside(target), "file", CONTENT[:4096])
    with pytest.raises(OSError, match="No space left"):
        publish(beside(target), target)
    assert newest_good(small_disk) == latest(small_disk) == before
    sweep(small_disk)
    ballast.unlink()
    assert save(small_disk, 2, kind) == newest_good(small_disk)


def test_a_manifest_that_may_not_grow_leaves_the_one_before(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    with largest_file(50), pytest.raises(OSError, match="File too large"):
        save(tmp_path, 2, content=b"short")
    assert newest_good(tmp_path) == latest(tmp_path) == before


def test_hashing_needs_little_memory(tmp_path: Path) -> None:
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", 100_000_000)  # a hole: no disk needed
    tracemalloc.start()
    checkpoints._digest(tmp_path / "big")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
