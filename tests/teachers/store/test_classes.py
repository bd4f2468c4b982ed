import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.teachers.store.classes import Classes, spread
from distill.teachers.store.planes import Packer, Unpacker


@settings(deadline=None, max_examples=60)
@given(
    v=st.sampled_from([1, 2, 77, 255, 256, 257, 65_535, 65_536, 70_000]),
    lengths=st.lists(st.integers(0, 300), max_size=8),
    seed=st.integers(0, 1000),
)
def test_sets_come_back(v: int, lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = [min(length, v) for length in lengths]
    ids = np.full((len(lengths), max(lengths, default=1)), -1, np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = random.choice(v, length, replace=False)
    packer, classes = Packer(), Classes(random.permutation(v).astype(np.int32))
    where = classes.put(packer, ids)
    found, known = classes.take(Unpacker(packer.bytes()), len(ids))
    assert [set(row[row >= 0]) for row in found] == [set(row[row >= 0]) for row in ids]
    assert np.array_equal(known, found >= 0)
    assert known.sum(1).tolist() == lengths
    if len(ids):
        assert np.array_equal(spread(ids.ravel()[where], known)[known], found[known]), "values that go along stay with their class"


def test_all_classes_of_a_large_vocabulary() -> None:
    ids = np.random.default_rng(0).permutation(70_000).astype(np.int32)[None]
    packer, classes = Packer(), Classes(np.arange(70_000, dtype=np.int32))
    classes.put(packer, ids)
    assert np.array_equal(classes.take(Unpacker(packer.bytes()), 1)[0][0], np.arange(70_000))


def test_frequent_classes_cost_less_than_any() -> None:
    random, v, k = np.random.default_rng(0), 32_768, 50
    frequency = 1 / np.arange(1, v + 1)
    ids = np.stack([random.choice(v, k, replace=False, p=frequency / frequency.sum()) for _ in range(200)]).astype(np.int32)
    sizes = []
    for order in (np.arange(v), random.permutation(v)):
        packer = Packer()
        Classes(order.astype(np.int32)).put(packer, ids)
        sizes.append(len(packer.bytes()) / 200)
    any_set = (math.lgamma(v + 1) - math.lgamma(k + 1) - math.lgamma(v - k + 1)) / math.log(256)
    assert sizes[0] < 0.8 * any_set
    assert sizes[0] < 0.8 * sizes[1]


def test_a_class_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="different"):
        Classes(np.arange(9, dtype=np.int32)).put(Packer(), np.array([[3, 3]], np.int32))
