"""A store is written once, whatever happens on the way: killed, resumed, shared out, out of room; the bytes are the same."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from tqdm.std import TqdmDefaultWriteLock, tqdm  # type: ignore[import-untyped]
from transformers import LlamaForCausalLM

from distill.data.text import PromptData
from distill.losses.class_weighted import ClassWeighted, FrequencyPower
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.report.progress import Progress
from distill.report.sources import caching
from distill.schedule import Linear
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from distill.teachers.routed import Routed
from distill.teachers.store import Header, Manifest, Store
from distill.teachers.store.shard import shard_path
from distill.types import ConfigError, DataError, Outputs
from tests import pair
from tests.data.helpers import WORDS
from tests.disk import disk
from tests.ranks import run_ranks
from tests.stores import cached, job, written

KEPT = {"draws": 12, "k": 2, "temperature": 2.0}
TERMS = {"kd": ForwardKL(2.0), "hidden": HiddenMSE(layers="last")}


def content(folder: Path) -> dict[str, bytes]:
    """The files of a store; not what a killed process has left beside them."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def ready(folder: Path, store: str, fabric: Any = None, rows: int = 64) -> tuple[caching.Job, list[str]]:
    data, teacher = pair.data(folder, rows), cached(folder, store=store, **KEPT)
    module = pair.module(folder, losses=dict(TERMS), balancer=None)
    made = job(teacher, data, module, fabric)
    return made, caching.taps_of(module, teacher, data)


def killed_and_resumed(name: str, kills: int) -> list[tuple[int, bool]]:
    """In a process that has loaded everything: fork writers, kill each when so many files are there, let another go on.

    Returns:
        For each writer, how many shards were finished when it died, and whether the store that was resumed is the whole one.
    """
    # tqdm's own lock, which datasets takes for every batch, is a semaphore that forks share: a writer killed while it holds it would
    # leave it locked for all that come after. A lock that is set before any bar is made is that of its subclasses too.
    assert not hasattr(TqdmDefaultWriteLock, "mp_lock")
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    folder, rng = Path(name), random.Random(5)
    made, taps = ready(folder, "whole", rows=36)
    write = lambda store: (made.cached.keep_in(str(store)), caching.write(made, taps, 4))
    _forked(write, folder / "whole", lambda: False)
    expected, found = content(folder / "whole"), []
    for number in range(kills):
        store, names = folder / f"store-{number}", rng.randint(1, len(expected) - 1)
        _forked(write, store, lambda store=store, names=names: store.exists() and len(os.listdir(store)) > names)
        shards = len(list(store.glob("shard-*.json")))
        whole = (store / "finished.json").exists()
        _forked(write, store, lambda: False)
        found.append((-1 if whole else shards, content(store) == expected))
    return found


def _forked(write: Callable[[Path], Any], store: Path, enough: Callable[[], bool]) -> None:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        write(store)
        os._exit(0)
    end = time.monotonic() + 100
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        late = time.monotonic() > end
        if late or enough():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert not late, "the writer does not end"
            return
        time.sleep(0.003)


@pytest.mark.slow
def test_killed_at_20_moments_it_goes_on_to_the_same_store(tmp_path: Path) -> None:
    (found,) = run_ranks(killed_and_resumed, 1, str(tmp_path), 20, timeout_s=400)
    assert [same for _, same in found] == [True] * 20
    died = [shards for shards, _ in found if shards >= 0]
    assert len(died) >= 15, "most were killed before the end"
    assert len(set(died)) >= 5, "at different moments"


def test_finished_shards_are_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, losses=dict(TERMS), **KEPT)
    assert "4 shards, 4 of them written now" in capsys.readouterr().out
    folder, before = tmp_path / "store", content(tmp_path / "store")
    for name in ("finished.json", "shard-00002.json"):
        (folder / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.bin")}
    made, taps = ready(tmp_path, "store")
    asked: list[int] = []
    before_ask = caching._ask
    monkeypatch.setattr(caching, "_ask", lambda job, batch, taps: (asked.append(len(batch["labels"])), before_ask(job, batch, taps))[1])
    caching.write(made, taps, 16)
    assert content(folder) == before
    changed = [path.name for path in folder.glob("shard-*.bin") if path.stat().st_mtime_ns != times[path.name]]
    assert changed == ["shard-00002.bin"]
    assert asked[:5] == [1, 4, 4, 4, 4], "one row for the widths, then the batches of the one shard that is missing"
    assert "4 shards, 1 of them written now" in capsys.readouterr().out


def test_what_is_whole_is_left_alone_and_what_went_bad_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, **KEPT)
    folder, before = tmp_path / "store", content(tmp_path / "store")
    written(tmp_path, **KEPT)
    assert f"The store {folder} is whole: all its 4 shards are there, nothing to do" in capsys.readouterr().out
    path = shard_path(folder, 1)
    path.write_bytes(before["shard-00001.bin"][:-1] + b"?")
    shard_path(folder, 3).unlink()
    written(tmp_path, **KEPT)
    assert content(folder) == before
    assert "4 shards, 2 of them written now" in capsys.readouterr().out


def write_on_a_rank(name: str) -> str:
    strategy = DDPStrategy(process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    made, taps = ready(Path(name), "shared", fabric)
    wrote: list[int] = []
    before = caching._write_shard
    caching._write_shard = lambda job, header, shard, *rest: (wrote.append(shard), before(job, header, shard, *rest))[1]
    caching.write(made, taps, 16)
    return str(wrote)


def test_two_ranks_share_the_shards_out_and_write_the_same(tmp_path: Path) -> None:
    written(tmp_path, losses=dict(TERMS), **KEPT)
    assert run_ranks(write_on_a_rank, 2, str(tmp_path)) == ["[0, 2]", "[1, 3]"]
    shared, alone = content(tmp_path / "shared"), content(tmp_path / "store")
    assert shared.pop("finished.json") != b""
    alone.pop("finished.json")  # the sum over the ranks has another order
    assert shared == alone
    measures = [Store(tmp_path / name).measures for name in ("shared", "store")]
    assert measures[0] == pytest.approx(measures[1], rel=1e-12)


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    written(tmp_path, losses=dict(TERMS), **KEPT)
    with disk(tmp_path / "small", "44k") as folder:
        made, taps = ready(tmp_path, "small/store")
        with pytest.raises(DataError, match=r"cannot write '.*shard-0000\d\.bin': No space left on device; the finished shards are kept"):
            caching.write(made, taps, 16)
        finished = sorted(path.name for path in (folder / "store").glob("shard-*.json"))
        assert 0 < len(finished) < 4
        os.system(f"mount -o remount,size=1m {folder}")
        caching.write(made, taps, 16)
        assert content(folder / "store") == content(tmp_path / "store")


def test_another_teacher_at_the_same_place_is_noticed(tmp_path: Path) -> None:
    written(tmp_path, **KEPT)
    made, taps = ready(tmp_path, "store")
    (model,) = made.source.models()
    with torch.no_grad():
        next(model.parameters())[3, 0] += 1
    with pytest.raises(ConfigError, match=r"made with weights='[0-9a-f]+', but '[0-9a-f]+' is wanted"):
        caching.write(made, [], 16)
    assert taps == ["model.layers.1"]


@pytest.mark.parametrize(
    ("changed", "said"), [({"seed": 1}, r"made with described\.seed=0, but 1 is wanted"), ({"k": 3}, "k=2, but 3 is wanted")]
)
def test_a_store_of_something_else_is_not_gone_on_with(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    written(tmp_path, **KEPT)
    with pytest.raises(ConfigError, match=said):
        written(tmp_path, **(KEPT | changed))


def test_what_training_would_refuse_is_refused_before_the_teacher_is_asked(tmp_path: Path) -> None:
    for terms in ({"kd": ForwardKL(4.0)}, {"kd": ForwardKL(4.0), "hidden": HiddenMSE(layers="last")}):
        with pytest.raises(ConfigError, match=r"model\.losses\.kd\.temperature is 4, but model\.teacher\.temperature is 2"):
            written(tmp_path, losses=terms, **KEPT)
    moving = {"kd": ForwardKL(Linear(2.0, 4.0))}
    with pytest.raises(
        ConfigError, match=r"temperature is 4, but model\.teacher\.temperature is 2; they must agree from the first step to"
    ):
        written(tmp_path, losses=moving, **KEPT)
    wrapped = {"kd": ClassWeighted(ForwardKL(4.0), FrequencyPower(0.5))}
    with pytest.raises(ConfigError, match=r"model\.losses\.kd\.temperature is 4, but"):
        written(tmp_path, losses=wrapped, **KEPT)
    teacher = CachedTeacher(str(tmp_path / "store"), source=SelfTeacher(), **KEPT)
    with pytest.raises(ConfigError, match=r"SelfTeacher is the student without its adapters, .* take OnlineTeacher"):
        job(teacher, pair.data(tmp_path), pair.module(tmp_path, losses=dict(TERMS), balancer=None))
    assert not (tmp_path / "store").exists()


def test_equal_rows_of_different_teachers_have_each_their_own_target(tmp_path: Path) -> None:
    """And a batch without labels, which fills a rank's number up, is of no teacher."""
    pair.data(tmp_path)
    shutil.copytree(tmp_path / "teacher", tmp_path / "other")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    rows = [{"prompt": "a b", "completion": f"c {'defghij'[i // 2]}", "by": "xy"[i % 2]} for i in range(14)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given: dict[str, Any] = {"tokenizer": str(tmp_path / "teacher"), "pack": False, "max_length": 32, "route_column": "by"}
    data = PromptData(train_data=str(tmp_path / "rows.jsonl"), val_data=str(tmp_path / "rows.jsonl"), **given)
    teachers: dict[str, Teacher] = {"x": OnlineTeacher(str(tmp_path / "teacher")), "y": OnlineTeacher(str(tmp_path / "other"))}
    kept: dict[str, Any] = {"k": len(WORDS), "draws": 0, "bits": 32}
    module = pair.module(tmp_path, losses={"kd": ForwardKL(1.0)}, balancer=None)
    made = job(CachedTeacher(str(tmp_path / "store"), source=Routed(teachers), **kept), data, module)
    caching.write(made, [], 16)
    made.cached.setup(data.task(), torch.device("cpu"), torch.float32)
    batch = data.collator()([data.train_set[i] for i in range(14)])
    found, valid = made.cached(batch), batch["labels"] != -100
    for i, row in enumerate(rows):
        online = teachers[row["by"]](batch)
        assert isinstance(online, Outputs)
        wanted = online.head(online.features[i, valid[i]])[:, : data.num_classes].softmax(-1)
        dense = torch.zeros_like(wanted).scatter(-1, found.ids[i, valid[i]], found.probs[i, valid[i]])
        torch.testing.assert_close(dense, wanted)
    blank = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert caching._measured(made, blank).tolist() == [0.0, 0.0, 0.0]


def test_attention_maps_are_not_kept(tmp_path: Path) -> None:
    made, _ = ready(tmp_path, "store")
    made.source.model.set_attn_implementation("eager")  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"want 'model\.layers\.0\.self_attn:1' of the teacher, of shape \[1, 2, \d+, \d+\]; a store keeps"
    ):
        caching.write(made, ["model.layers.0.self_attn:1"], 16)


def test_the_size_of_a_shard_is_chosen_by_what_a_row_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = ready(tmp_path, "store")
    assert caching.header_of(made, [], None).rows_per_shard == 4, "64 shards would have one row each; a batch has four"
    monkeypatch.setattr(caching, "SHARDS", 2)
    assert caching.header_of(made, [], None).rows_per_shard == (len(made.data.train_set) + 1) // 2
    monkeypatch.setattr(caching, "SHARD_BYTES", 10 * 32 * (64 + 24))  # ten rows of 32 positions with a state of 24 values
    assert caching.header_of(made, ["model.layers.1"], None).rows_per_shard == 10


def test_progress_says_what_is_left_and_how_large_it_will_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    header = Header("t", None, "", "", 4, 1.0, 0, 1, 8, "", 100, 25)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(header, [0, 2, 3], True, every_s=10.0) as progress:
        for _ in range(30):
            now[0] += 1.0
            progress.row()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["11/75 rows · 01:04 left · no shard yet", "22/75 rows · 00:53 left · no shard yet"]
    progress.written(Manifest(0, 25, 500, 2_000_000, "", "", ""))
    assert progress.size() == "2.0 MB, about 4.0 MB to come"


def test_a_bar_is_for_the_first_rank(capsys: pytest.CaptureFixture[str]) -> None:
    header = Header("t", None, "", "", 4, 1.0, 0, 1, 8, "", 2, 1)
    with Progress(header, [1], False, every_s=0.0) as progress:
        progress.row()
    assert capsys.readouterr().out == ""
