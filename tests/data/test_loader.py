import math
import os
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.utils import tqdm as datasets_tqdm
from tqdm import tqdm

from distill.data.loader import EvalLoader, Loader, permutation
from distill.data.packing import stack
from distill.losses.hard import CrossEntropy
from distill.teachers.online import OnlineTeacher
from distill.types import ConfigError, DataError
from tests import pair
from tests.data.helpers import numbered


def rows(count):
    return Dataset.from_list(numbered(count)).with_format("numpy")


def ids(batches):
    return [batch["sample_ids"].tolist() for batch in batches]


def flat(batches):
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize(("world_size", "window", "batch_size"), [(1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 1, 4), (4, 2, 1), (2, 2, 2)])
def test_every_split_sees_the_same_samples_in_each_step(world_size, window, batch_size):
    data = rows(27)  # three steps of 8, and a tail of 3
    for epoch in range(2):
        order = np.random.default_rng((5, epoch)).permutation(27)
        steps = [set() for _ in range(3)]
        for rank in range(world_size):
            loader = Loader(data, stack, batch_size, window, rank, world_size, seed=5)
            batches = [ids(loader) for _ in range(epoch + 1)][-1]
            assert len(batches) == len(loader) == 3 * window
            for i, batch in enumerate(batches):
                assert len(batch) == batch_size
                assert not steps[i // window] & set(batch)
                steps[i // window] |= set(batch)
        assert steps == [set(order[g * 8 : g * 8 + 8].tolist()) for g in range(3)]


def test_num_valid_counts_the_window_of_this_rank():
    loader = Loader(rows(24), stack, 2, window=3, rank=1, world_size=2)
    batches = list(loader)
    for start in range(0, len(batches), 3):
        window = batches[start : start + 3]
        # row i has 1 + i % 3 valid labels
        expected = sum(1 + i % 3 for batch in window for i in batch["sample_ids"].tolist())
        for batch in window:
            assert batch["num_valid"].shape == ()
            assert batch["num_valid"].dtype == torch.int64
            assert batch["num_valid"].item() == expected


def test_rows_and_ids_belong_together():
    for batch in Loader(rows(12), stack, 4):
        assert batch["input_ids"][:, 0].tolist() == batch["sample_ids"].tolist()


def test_epochs_advance_and_differ():
    loader = Loader(rows(16), stack, 4, seed=1)
    first, second = ids(loader), ids(loader)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(16))
    assert first != second
    assert flat(second) == permutation(16, 1, 1).tolist()


def test_same_order_repeats_epoch_zero():
    loader = Loader(rows(16), stack, 4, same_order=True)
    assert ids(loader) == ids(loader)


def test_the_permutation_is_pinned():
    """A change would silently resume old runs on other samples."""
    assert permutation(8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 6, 7, 11, 12])
def test_resume_replays_from_the_last_completed_window(num_workers, stop):
    def make():
        return Loader(rows(25), stack, 2, window=2, seed=3, num_workers=num_workers)

    whole = make()
    expected = ids(whole) + ids(whole)  # 2 epochs of 12 micro-batches
    before = make()
    iterator = iter(before)
    for _ in range(stop):
        next(iterator)
    state = before.state_dict()
    assert state == ({"epoch": 1, "samples": 0} if stop == 12 else {"epoch": 0, "samples": stop // 2 * 4})
    after = make()
    after.load_state_dict(state)
    resumed = ids(after) if stop == 12 else ids(after) + ids(after)
    assert resumed == expected[stop // 2 * 2 :]


def test_resume_at_another_world_size():
    one = Loader(rows(32), stack, 4, window=2)
    iterator = iter(one)
    for _ in range(4):
        next(iterator)
    rest = {i for batch in ids(iterator) for i in batch}
    state = {"epoch": 0, "samples": 16}
    ranks = [Loader(rows(32), stack, 2, window=2, rank=r, world_size=2) for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    assert {i for loader in ranks for batch in ids(loader) for i in batch} == rest


def test_a_state_may_be_loaded_after_iter_and_counts_once():
    loader = Loader(rows(16), stack, 4)
    iterator = iter(loader)
    loader.load_state_dict({"epoch": 2, "samples": 8})
    order = permutation(16, 0, 2).tolist()
    assert flat(ids(iterator)) == order[8:]
    assert flat(ids(loader)) == permutation(16, 0, 3).tolist()


def test_an_abandoned_epoch_is_not_continued():
    loader = Loader(rows(16), stack, 4)
    next(iter(loader))
    assert flat(ids(loader)) == permutation(16, 0, 1).tolist()


def test_the_global_random_state_is_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Loader(rows(16), stack, 4))
    list(EvalLoader(rows(5), stack, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_rows():
    with pytest.raises(DataError, match=r"7 rows.*one optimizer step takes 8 \(2 devices × 2 accumulated × 2 batch_size\).*lower"):
        Loader(rows(7), stack, 2, window=2, world_size=2)


def test_limit_ends_the_epoch():
    loader = Loader(rows(24), stack, 2, window=2, limit=4)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    assert loader.state_dict() == {"epoch": 1, "samples": 0}
    with pytest.raises(ConfigError, match=r"limit_train_batches=3.*window of 2; use a multiple of 2"):
        Loader(rows(24), stack, 2, window=2, limit=3)


def test_another_global_batch_cannot_resume():
    with pytest.raises(ConfigError, match=r"sample 6 of epoch 1.*global batch of 4"):
        Loader(rows(24), stack, 4).load_state_dict({"epoch": 1, "samples": 6})


class Counted:
    """Rows that note which were read, in order."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        self.read.extend(indices)
        return self.data.__getitems__(indices)


def told(loader):
    """Let a loader tell ahead into a list, and give that list."""
    heard = []
    loader.ahead = lambda batch: heard.append(batch)
    return heard


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_ahead_is_told_every_batch_once_in_order_and_one_step_early(window, num_workers):
    loader = Loader(rows(26), stack, 2, window, seed=4, num_workers=num_workers)
    heard, seen = told(loader), []
    per_epoch = len(loader)
    assert per_epoch == {1: 13, 3: 12}[window]
    for epoch in range(2 if num_workers else 3):
        for i, batch in enumerate(loader):
            seen.append(batch["sample_ids"].tolist())
            of_epoch = min(per_epoch, (i // window + 2) * window)  # this step and the next
            assert len(heard) == epoch * per_epoch + of_epoch
            assert set(heard[-1]) == set(batch) - {"num_valid"}
    assert ids(heard) == seen
    assert seen == by_permutation(26, window, len(seen) // per_epoch)


def by_permutation(count, window, epochs):
    """The batches of two rows that the permutations say."""
    usable = count // (2 * window) * 2 * window
    return [permutation(count, 4, epoch)[i : i + 2].tolist() for epoch in range(epochs) for i in range(0, usable, 2)]


def test_what_is_told_is_what_comes():
    loader = Loader(rows(24), stack, 2, window=2)
    heard, iterator = told(loader), iter(loader)
    assert heard == []  # Lightning calls iter() as a check
    batches = list(iterator)
    for early, batch in zip(heard, batches, strict=True):
        for name in ("input_ids", "labels", "sample_ids"):
            assert torch.equal(early[name], batch[name])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ahead_changes_no_batch_and_no_position(num_workers):
    plain, ahead = (Loader(rows(25), stack, 2, window=2, seed=3, num_workers=num_workers) for _ in range(2))
    told(ahead)
    for _ in range(2):
        for one, other in zip(plain, ahead, strict=True):
            assert plain.state_dict() == ahead.state_dict()
            assert set(one) == set(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert plain.state_dict() == ahead.state_dict() == {"epoch": 2, "samples": 0}


@pytest.mark.parametrize(("stop", "num_workers"), [(0, 0), (1, 0), (2, 0), (5, 0), (5, 2), (11, 0), (12, 0)])
def test_ahead_after_a_resume_is_told_what_is_left(stop, num_workers):
    def make():
        return Loader(rows(25), stack, 2, window=2, seed=3, num_workers=num_workers)

    before = make()
    told(before)
    iterator = iter(before)
    for _ in range(stop):
        next(iterator)
    after = make()
    heard = told(after)
    after.load_state_dict(before.state_dict())
    resumed = ids(after)
    assert ids(heard) == resumed
    plain = make()
    whole = ids(plain) + ids(plain)
    start = stop // 2 * 2
    assert resumed == (whole[start:12] if stop < 12 else whole[12:])


def test_ahead_is_told_of_what_a_limit_leaves():
    loader = Loader(rows(24), stack, 2, window=2, limit=4)
    heard = told(loader)
    for _ in range(4):  # as Lightning, which asks for no more
        iterator = iter(loader)
        got = [next(iterator)["sample_ids"].tolist() for _ in range(4)]
        assert ids(heard[-4:]) == got
    assert len(heard) == 16


def test_ranks_are_told_of_their_own_batches():
    for rank in range(2):
        loader = Loader(rows(24), stack, 2, window=2, rank=rank, world_size=2)
        heard = told(loader)
        assert ids(loader) == ids(heard)


class Listening(OnlineTeacher):
    """Notes what it is told and what it is asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.told, self.asked, self.early = [], [], []

    def ahead(self, batch):
        self.told.append(batch["sample_ids"].tolist())

    def __call__(self, batch, taps=()):
        self.asked.append(batch["sample_ids"].tolist())
        self.early.append(len(self.told) - len(self.asked))
        return super().__call__(batch, taps)


def test_a_teacher_is_told_of_each_batch_that_training_asks_it_for(tmp_path):
    data = pair.data(tmp_path, batch_size=4)
    teacher = Listening(str(tmp_path / "teacher"))
    pair.trainer(max_epochs=2, accumulate_grad_batches=3).fit(pair.module(tmp_path, teacher=teacher), data)
    per_epoch = len(data.train_dataloader())
    assert per_epoch >= 12
    assert len(teacher.asked) == 2 * per_epoch
    assert teacher.told == teacher.asked
    # 6 told and 1 asked for at the first micro-batch of a step; the last step of an epoch has none after it
    assert teacher.early[:6] == [5, 4, 3, 5, 4, 3]
    assert teacher.early[per_epoch - 3 : per_epoch] == [2, 1, 0]

    pair.trainer(max_steps=1).fit(pair.module(tmp_path, teacher=None, losses={"ce": CrossEntropy()}, balancer=None), data)
    assert len(teacher.told) == 2 * per_epoch  # the data tell no teacher of an earlier run


@pytest.mark.parametrize("window", [1, 3])
def test_without_ahead_nothing_is_read_early(window):
    source = Counted(rows(24))
    for step, _ in enumerate(Loader(source, stack, 2, window)):
        assert len(source.read) == (step // window + 1) * window * 2
    source = Counted(rows(24))
    loader = Loader(source, stack, 2, window)
    told(loader)
    for step, _ in enumerate(loader):
        assert len(source.read) == min(24, (step // window + 2) * window * 2)


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 2), (10, 4), (1, 3), (8, 2)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_eval_sees_each_row_once_and_keeps_ranks_in_step(count, world_size, num_workers):
    if num_workers and count != 10:
        pytest.skip("one case with workers is enough")
    ranks = [list(EvalLoader(rows(count), stack, 2, rank, world_size, num_workers)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert [len(EvalLoader(rows(count), stack, 2, r, world_size)) for r in range(world_size)] == [len(b) for b in ranks]
    batches = [batch for rank in ranks for batch in rank]
    # row i is [i, i, i] with 1 + i % 3 valid labels, so that a row without any is of a blank batch
    valid = [(int(row[0]), int((labels != -100).sum())) for b in batches for row, labels in zip(b["input_ids"], b["labels"], strict=True)]
    assert sorted(pair for pair in valid if pair[1]) == [(i, 1 + i % 3) for i in range(count)]
    blank = [batch for batch in batches if (batch["labels"] == -100).all()]
    assert len(blank) == -math.ceil(count / 2) % world_size


def killed_in_a_bar(batch):
    with datasets_tqdm.get_lock():
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("bar", [tqdm, datasets_tqdm])
def test_a_reader_that_is_killed_takes_no_lock_along(bar):
    """The bars' lock is a semaphore that forks share, and the training's own bar takes it."""
    bar(disable=True)  # makes the lock, as a progress bar does
    with pytest.raises(RuntimeError, match=r"killed by signal: Killed|exited unexpectedly"):
        list(EvalLoader(rows(4), killed_in_a_bar, 2, 0, 1, num_workers=1))
    for each in (tqdm, datasets_tqdm):
        for lock in each.get_lock().locks:
            assert lock.acquire(timeout=5)
            lock.release()
