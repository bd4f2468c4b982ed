import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from distill.data.loader import EvalLoader, Loader, permutation
from distill.data.packing import stack
from distill.types import ConfigError, DataError
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
