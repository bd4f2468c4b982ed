from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.teachers.store.planes import Packer, Unpacker

ARRAYS = st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 2**31 - 1), max_size=30)), max_size=6)


@settings(deadline=None, max_examples=50)
@given(arrays=ARRAYS)
def test_arrays_come_back_in_their_order(arrays: list[tuple[int, list[int]]]) -> None:
    packer = Packer()
    for width, values in arrays:
        packer.put(np.array([value % 256**width for value in values], np.int64), width)
    unpacker = Unpacker(packer.bytes())
    for width, values in arrays:
        assert unpacker.take(len(values), width).tolist() == [value % 256**width for value in values]


@pytest.mark.parametrize("values", [np.array([-1, -(2**31), 7], np.int32), np.array([1.5, -0.0, np.pi], np.float32).view(np.int32)])
def test_all_four_bytes_come_back(values: Any) -> None:
    packer = Packer()
    packer.put(values, 4)
    assert Unpacker(packer.bytes()).take(3, 4).tolist() == values.tolist()


def test_planes_are_as_small_as_their_entropy() -> None:
    values = np.random.default_rng(0).geometric(0.1, 20_000).clip(max=255)
    _, counts = np.unique(values, return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    packer = Packer()
    packer.put(values)
    assert entropy < len(packer.bytes()) < 1.03 * entropy
