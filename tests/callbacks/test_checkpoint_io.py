import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import distributed

from distill import checkpoints
from distill.callbacks.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO, snapshot
from distill.types import ConfigError, TrainingError
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.disk import largest_file
from tests.ranks import run_ranks

GOOD: dict[str, Any] = {"weight": torch.arange(1000.0), "step": 7}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def with_manifests(names: list[str]) -> list[str]:
    return [whole for name in names for whole in (name, f"{name}.sha256")]


LEFT = ["last.ckpt", "last.ckpt.sha256", "latest"]


def assert_good(path: Path) -> None:
    found = torch.load(path)
    assert found["step"] == 7
    assert torch.equal(found["weight"], GOOD["weight"])


def test_trainer_saves_and_resumes_through_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "run", filename="{step}", save_top_k=-1, every_n_train_steps=2, save_last=True)
    first = trainer(saver, plugins=[AtomicCheckpointIO()], enable_checkpointing=True, max_steps=4)
    first.fit(Tiny(), loader())
    names = ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.ckpt", "last.ckpt.sha256", "latest", *with_manifests(names[1:])]
    assert not any(checkpoints.verify(tmp_path / "run" / name) for name in names)
    model = Tiny()
    second = trainer(plugins=[AtomicCheckpointIO()], max_steps=4)
    second.fit(model, loader(), ckpt_path=tmp_path / "run" / "last.ckpt")
    assert second.global_step == 4
    assert torch.equal(model.layer.weight, torch.load(tmp_path / "run" / "step=4.ckpt")["state_dict"]["layer.weight"])


@pytest.fixture(params=[AtomicCheckpointIO, AsyncCheckpointIO])
def io(request: pytest.FixtureRequest) -> Any:
    return request.param()


def save(io: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path) -> None:
    io.save_checkpoint(checkpoint, path)
    io.wait()


@pytest.mark.parametrize("room", [0, 100, 3000, 5000])
def test_full_disk_at_any_byte_leaves_the_previous_file_and_no_other(good: Path, io: Any, room: int) -> None:
    step = good.with_name("step-00000008.ckpt")
    said = r"cannot write checkpoint '.*step-00000008\.ckpt': File too large; the one before, .*last\.ckpt, is as it was"
    with largest_file(room), pytest.raises(TrainingError, match=said):
        save(io, GOOD | {"step": 8}, step)
    assert_good(good)
    assert names(good) == LEFT
    io.teardown()  # says it once


def test_object_that_cannot_be_pickled_leaves_the_previous_file(good: Path, io: Any) -> None:
    with pytest.raises(Exception, match="lambda"):
        save(io, {"weight": torch.ones(9), "bad": lambda: None}, good)
    assert_good(good)
    assert names(good) == LEFT


def test_sigkill_in_a_save_leaves_the_previous_file_as_the_last(good: Path, io: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), signal.SIGKILL))
        save(io, {"step": 8}, good)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert_good(good)
    assert len(names(good)) == 1 + len(LEFT)  # the torn one is there, and must not be taken for a checkpoint
    assert [p.name for p in good.parent.glob("*.ckpt")] == ["last.ckpt"]
    saver = ModelCheckpoint(good.parent)
    assert {Path(p).name for p in saver._find_last_checkpoints(trainer(saver, enable_checkpointing=True))} == {"last.ckpt"}


def test_permissions_are_those_of_any_new_file(good: Path) -> None:
    other = good.parent / "other"
    other.touch()
    assert good.stat().st_mode == other.stat().st_mode


def test_storage_options_are_refused_as_by_lightning(tmp_path: Path) -> None:
    for io in (AtomicCheckpointIO(), pl.plugins.io.TorchCheckpointIO()):
        with pytest.raises(TypeError, match="storage_options"):
            io.save_checkpoint({}, tmp_path / "x.ckpt", storage_options={"a": 1})


def test_path_with_a_scheme_goes_to_lightning() -> None:
    fsspec = pytest.importorskip("fsspec")
    AtomicCheckpointIO().save_checkpoint(GOOD, "memory://run/last.ckpt")
    with fsspec.filesystem("memory").open("/run/last.ckpt", "rb") as file:
        assert torch.load(file)["step"] == 7


def test_missing_file_names_those_that_are_there(good: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint '.*step=9.ckpt'; in '.*run' there are last.ckpt"):
        AtomicCheckpointIO().load_checkpoint(good.parent / "step=9.ckpt")
    with pytest.raises(ConfigError, match=r"no checkpoint '.*x.ckpt'; give the path of a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(good.parent / "nowhere" / "x.ckpt")


@pytest.mark.parametrize("torn", [b"", b"not a checkpoint at all", None])
def test_torn_file_is_an_error_for_people(good: Path, torn: bytes | None) -> None:
    good.write_bytes(good.read_bytes()[:2000] if torn is None else torn)
    with pytest.raises(ConfigError, match=r"cannot read checkpoint '.*last.ckpt': .+; the file is torn or no checkpoint; give the path"):
        AtomicCheckpointIO().load_checkpoint(good)


def test_folder_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, which several ranks have written"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_objects_that_the_safe_loader_refuses_say_so(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"path": Path("x")}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="weights_only=False if you trust"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False) == {"path": Path("x")}


def test_the_hash_is_of_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoints.publish

    def flip_first(temporary: Path, *args: Any) -> None:
        with temporary.open("r+b") as file:
            file.seek(1000)
            file.write(bytes([file.read(1)[0] ^ 1]))
        written(temporary, *args)

    monkeypatch.setattr(checkpoints, "publish", flip_first)
    with pytest.raises(TrainingError, match="has other bytes than were written"):
        AtomicCheckpointIO().save_checkpoint(GOOD, tmp_path / "x.ckpt")
    assert checkpoints.latest(tmp_path) is None


def test_removing_takes_the_manifest_along(good: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(good)
    assert names(good) == ["latest"]


class Gate:
    """Holds every publication up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting, real = threading.Event(), threading.Event(), checkpoints.publish

        def gated(*args: Any) -> None:
            self.waiting.set()
            assert self.open.wait(120)
            real(*args)

        monkeypatch.setattr(checkpoints, "publish", gated)


def test_async_takes_the_weights_of_the_moment_and_publishes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, io = Gate(monkeypatch), AsyncCheckpointIO()
    weight, state = torch.zeros(100), {"loops": {"done": 3}, "list": [1]}
    io.save_checkpoint({"weight": weight, **state}, tmp_path / "a.ckpt")
    weight += 1  # as an optimizer does
    state["loops"]["done"] = 4
    assert gate.waiting.wait(120)
    assert checkpoints.latest(tmp_path) is None
    assert not (tmp_path / "a.ckpt").exists()
    gate.open.set()
    io.wait()
    found = torch.load(tmp_path / "a.ckpt")
    assert not found["weight"].any()
    assert found["loops"] == {"done": 3}
    io.teardown()


def test_async_writes_one_at_a_time_and_reads_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, io = Gate(monkeypatch), AsyncCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    second = threading.Thread(target=io.save_checkpoint, args=({"step": 2}, tmp_path / "b.ckpt"))
    second.start()
    assert gate.waiting.wait(120)
    assert second.is_alive()
    assert [p.name for p in tmp_path.iterdir()] == [".a.ckpt.tmp"]
    gate.open.set()
    second.join()
    assert io.load_checkpoint(tmp_path / "b.ckpt") == {"step": 2}
    assert (tmp_path / "a.ckpt").exists()
    io.teardown()


def test_async_tells_an_error_at_the_next_save_and_goes_on(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    (tmp_path / "file").touch()
    io.save_checkpoint({"step": 1}, tmp_path / "file" / "a.ckpt")
    with pytest.raises(TrainingError, match=r"cannot write checkpoint '.*a.ckpt'.*there is none before it"):
        io.save_checkpoint({"step": 2}, tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()
    save(io, {"step": 3}, tmp_path / "c.ckpt")
    io.save_checkpoint({"step": 1}, tmp_path / "file" / "a.ckpt")
    with pytest.raises(TrainingError, match=r"a\.ckpt"):
        io.teardown()
    io.teardown()
    save(io, {"step": 4}, tmp_path / "d.ckpt")  # a second fit
    io.teardown()


def test_a_snapshot_of_tied_weights_is_as_small_as_they_are(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    tied = {"embedding": weight, "head": weight, "rows": weight[3:5], "transposed": weight.t(), "more": [(weight[0], 7)]}
    copied = snapshot(tied)
    torch.save(tied, tmp_path / "tied")
    torch.save(copied, tmp_path / "copied")
    assert (tmp_path / "copied").stat().st_size == pytest.approx((tmp_path / "tied").stat().st_size, rel=0.01)
    assert copied["head"].data_ptr() == copied["embedding"].data_ptr() != weight.data_ptr()
    for name in ("embedding", "head", "rows", "transposed"):
        assert torch.equal(copied[name], tied[name])
        assert copied[name].stride() == tied[name].stride()
    assert torch.equal(copied["more"][0][0], weight[0])
    weight.zero_()
    assert copied["rows"].any()


def load_as_ranks(folder: str) -> Any:
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    return AtomicCheckpointIO().load_checkpoint(Path(folder) / f"{rank}.ckpt")


def test_all_ranks_read_the_file_of_rank_zero(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"of": 0}, tmp_path / "0.ckpt")  # there is none for rank 1 to find
    assert run_ranks(load_as_ranks, 2, str(tmp_path)) == [{"of": 0}, {"of": 0}]
