"""Checkpoints that are folders: saved, damaged, resumed by the same and by other ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils._pytree import tree_leaves

from distill import checkpoints
from distill.parallel import folder as folders
from distill.parallel.weights import whole_state_dict
from distill.students.load import Pretrained
from distill.students.lora import LoRA
from distill.types import ConfigError, TrainingError
from tests import pair
from tests.parallel import runs
from tests.ranks import run_ranks


class Leg(NamedTuple):
    losses: list[float]
    parameters: int
    student: list[bytes]
    teacher: list[bytes]


def leg(folder: Path, spec: str, ranks: int, steps: int, begin: Path | None, end: Path | None, lora: bool = False) -> Leg:
    """Train up to so many steps on a global batch of 4 times 2, from one checkpoint to another."""
    module, record = runs.rich(folder, chunk=None), runs.Record()
    if lora:
        module.recipe_of_student = LoRA(Pretrained(str(folder / "teacher")), r=2)
    trainer = runs.trainer(spec, ranks, max_steps=steps, callbacks=[record])
    record.start = 0 if begin is None else int(begin.stem[-8:])
    trainer.fit(module, datamodule=pair.data(folder, batch_size=4 // ranks, seed=1), ckpt_path=begin)
    if end:
        trainer.save_checkpoint(end)
    return Leg(record.losses, size(module), pieces(whole_state_dict(trainer, module)), pieces(runs.teacher_of(module).state_dict()))


def pieces(weights: dict[str, torch.Tensor]) -> list[bytes]:
    """The beginnings of all matrices."""
    return [weight.numpy().tobytes()[:48] for weight in weights.values() if weight.ndim == 2]


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a folder."""
    if (path / ".metadata").exists():
        metadata = FileSystemReader(path).read_metadata().state_dict_metadata.values()
        return sum(m.size.numel() * m.properties.dtype.itemsize for m in metadata if isinstance(m, TensorStorageMetadata))
    leaves = [leaf for file in path.rglob("*.pt") for leaf in tree_leaves(torch.load(file, weights_only=False))]
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sum(storages.values())


def size(module: Any) -> int:
    """Parameters of the student and the losses, wherever they are."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    return run_ranks(leg, 1, folder, "auto", 1, 9, None, None)[0].losses


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ZeRO-2", "ZeRO-3", "fsdp2"])
def test_two_ranks_then_one_then_two(spec: str, folder: Path, alone: list[float], tmp_path: Path) -> None:
    three, six = tmp_path / checkpoints.name_of(3), tmp_path / checkpoints.name_of(6)
    first = run_ranks(leg, 2, folder, spec, 2, 3, None, three)[0]
    second = run_ranks(leg, 1, folder, spec, 1, 6, three, six)[0]
    third = run_ranks(leg, 2, folder, spec, 2, 9, six, None)[0]
    assert [*first.losses, *second.losses, *third.losses] == pytest.approx(alone, abs=1e-5)
    held = b"".join(file.read_bytes() for file in sorted(three.rglob("*")) if file.is_file())
    assert any(piece in held for piece in first.student)
    assert not any(piece in held for piece in first.teacher)
    at_most = 16 * first.parameters  # weights, their copies in float32 and two moments, 4 bytes each
    assert 0.7 * at_most < tensor_bytes(three) < 1.1 * at_most  # the teacher would be half as much again
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        three.name,
        checkpoints.manifest_of(three).name,
        six.name,
        checkpoints.manifest_of(six).name,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ZeRO-2+lora", "ZeRO-3+lora"])
def test_a_lora_student_without_its_frozen_base(spec: str, folder: Path, tmp_path: Path) -> None:
    half = tmp_path / checkpoints.name_of(2)
    straight, first = run_ranks(leg, 2, folder, spec, 2, 4, None, None, True)[0], run_ranks(leg, 2, folder, spec, 2, 2, None, half, True)[0]
    second = run_ranks(leg, 2, folder, spec, 2, 4, half, None, True)[0]
    assert [*first.losses, *second.losses] == straight.losses
    assert "base_layer.weight" not in (half / folders.NAME).read_text()
    assert "lora_A" in (half / folders.NAME).read_text()


def evaluated(folder: Path, spec: str, path: Path) -> list[float]:
    module = runs.rich(folder, chunk=None)
    trainer = runs.trainer(spec, 2, limit_val_batches=None)
    found = trainer.validate(module, datamodule=pair.data(folder, batch_size=2, seed=1), ckpt_path=path, verbose=False)
    return [found[0]["val/loss"]]


def trained_and_evaluated(folder: Path, spec: str, path: Path) -> list[float]:
    module = runs.rich(folder, chunk=None)
    trainer = runs.trainer(spec, 2, max_steps=2, limit_val_batches=None, val_check_interval=4, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=pair.data(folder, batch_size=2, seed=1))
    trainer.save_checkpoint(path)
    return [float(trainer.callback_metrics["val/loss"])]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ZeRO-3", "fsdp2"])
def test_a_checkpoint_is_evaluated(spec: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / checkpoints.name_of(2)
    expected = run_ranks(trained_and_evaluated, 2, folder, spec, path)
    assert run_ranks(evaluated, 2, folder, spec, path) == [pytest.approx(values, abs=1e-5) for values in expected]


# ---- folders


def saved(path: Path, kind: str = "ZeRO-2", names: tuple[str, ...] = ("a",)) -> Any:
    strategy = pair.trainer().strategy
    with folders.published(strategy, path, folders.Parts(kind, 2, list(names))) as here:
        (here / "x.pt").write_bytes(b"12345")
    return strategy


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.name_of(1)
    strategy = saved(path)
    assert folders.opened(strategy, str(path)) == (path, folders.Parts("ZeRO-2", 2, ["a"]))
    assert checkpoints.newest_good(tmp_path) == path


def test_a_damaged_or_foreign_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.name_of(1)
    strategy = saved(path)
    (path / "x.pt").write_bytes(b"12346")
    with pytest.raises(ConfigError, match=r"cannot read the checkpoint .*x.pt has other bytes than were written; take another one"):
        folders.opened(strategy, path)
    checkpoints.manifest_of(path).unlink()
    with pytest.raises(ConfigError, match="which is written last"):
        folders.opened(strategy, path)
    other = tmp_path / "one.ckpt"
    other.write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file, written by one process or DDP"):
        folders.opened(strategy, other)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.name_of(1)
    strategy = saved(path)

    def full() -> None:
        with folders.published(strategy, path, folders.Parts("ZeRO-2", 2, [])) as here:
            (here / "x.pt").write_bytes(b"1")
            raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match=r"cannot save the checkpoint .*: No space left"):
        full()
    assert folders.opened(strategy, path)[1].names == ["a"]
    assert checkpoints.verify(path) is None


def test_another_student_is_named(tmp_path: Path) -> None:
    folders.check_names(tmp_path, ["a"], ["a", "base"], frozen=["base"])
    with pytest.raises(ConfigError, match="is of another student or other losses: it lacks b; it has a, unknown here"):
        folders.check_names(tmp_path, ["a"], ["b"])


def full_on_rank_1(folder: Path, path: Path) -> str:
    strategy = pair.trainer(devices=2, strategy="ddp").strategy
    strategy._lightning_module = pair.DistillModule.__new__(pair.DistillModule)
    strategy.setup_environment()
    try:
        with folders.published(strategy, path, folders.Parts("ZeRO-2", 2, [])):
            if strategy.global_rank:
                raise OSError(28, "No space left on device")
    except TrainingError as error:
        return str(error)
    return "published"


def test_all_ranks_learn_of_it(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / checkpoints.name_of(1)
    messages = run_ranks(full_on_rank_1, 2, folder, path)
    assert messages == [f"cannot save the checkpoint '{path}': No space left on device"] * 2
    assert not path.exists()


def test_the_tensors_of_state_dicts_are_left_to_the_strategy() -> None:
    assert folders.names_only({"a": torch.zeros(1)}) == {"a": None}
