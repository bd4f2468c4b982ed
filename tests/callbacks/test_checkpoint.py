import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from distill.callbacks.checkpoint import AtomicCheckpointIO
from distill.types import ConfigError
from tests.callbacks.tiny import Tiny, loader, trainer

GOOD: dict[str, Any] = {"weight": torch.arange(1000.0), "step": 7}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def assert_good(path: Path) -> None:
    found = torch.load(path)
    assert found["step"] == 7
    assert torch.equal(found["weight"], GOOD["weight"])


def test_trainer_saves_and_resumes_through_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "run", filename="{step}", save_top_k=-1, every_n_train_steps=2, save_last=True)
    first = trainer(saver, plugins=[AtomicCheckpointIO()], enable_checkpointing=True, max_steps=4)
    first.fit(Tiny(), loader())
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    model = Tiny()
    second = trainer(plugins=[AtomicCheckpointIO()], max_steps=4)
    second.fit(model, loader(), ckpt_path=tmp_path / "run" / "last.ckpt")
    assert second.global_step == 4
    assert torch.equal(model.layer.weight, torch.load(tmp_path / "run" / "step=4.ckpt")["state_dict"]["layer.weight"])


def test_file_is_synced_before_the_rename_and_the_folder_after(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"fsync {os.fstat(handle).st_size > 4000}")
        fsync(handle)

    def watch_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(source).parent == Path(target).parent}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    AtomicCheckpointIO().save_checkpoint(GOOD, good)
    assert calls == ["fsync True", "replace True", "fsync folder"]


def fail_midway(checkpoint: Any, file: Any) -> None:
    file.write(b"half a checkpoint")
    raise OSError(28, "No space left on device")


def test_failed_save_leaves_the_previous_file_and_no_other(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", fail_midway)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 8}, good)
    monkeypatch.undo()
    assert_good(good)
    assert names(good) == ["last.ckpt"]


def test_object_that_cannot_be_pickled_leaves_the_previous_file(good: Path) -> None:
    with pytest.raises(Exception, match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(9), "bad": lambda: None}, good)
    assert_good(good)
    assert names(good) == ["last.ckpt"]


def test_sigkill_in_a_save_leaves_the_previous_file_as_the_last(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), signal.SIGKILL))
        AtomicCheckpointIO().save_checkpoint({"step": 8}, good)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert_good(good)
    assert len(names(good)) == 2  # the torn one is there, and must not be taken for a checkpoint
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
    with pytest.raises(ConfigError, match="cannot read checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_objects_that_the_safe_loader_refuses_say_so(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"path": Path("x")}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="weights_only=False if you trust"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False) == {"path": Path("x")}
