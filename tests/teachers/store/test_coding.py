from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.teachers.sparse import sparse_target
from distill.teachers.store import Header, StoredRow
from distill.teachers.store.coding import Coder
from distill.types import DataError
from tests.teachers.store.rows import header, sets, target


def again(row: StoredRow, of: Header, seed: int = 0) -> StoredRow:
    coder = Coder(of, np.random.default_rng(seed).permutation(of.num_classes).astype(np.int32))
    return coder.decode(coder.encode(row))


@settings(deadline=None, max_examples=80)
@given(
    v=st.sampled_from([2, 60, 700]),
    k_draws=st.sampled_from([(1, 0), (5, 0), (700, 0), (0, 1), (0, 64), (0, 300), (5, 20)]),
    bits=st.sampled_from([8, 16, 32]),
    positions=st.integers(0, 12),
    spread=st.floats(0, 12),
    seed=st.integers(0, 1000),
)
def test_rows_come_back(v: int, k_draws: tuple[int, int], bits: Any, positions: int, spread: float, seed: int) -> None:
    k, draws = k_draws
    of = header(num_classes=v, k=k, draws=draws, bits=bits, hidden={"b": 3, "a": 5})
    row = target(of, positions, seed, spread)
    found = again(row, of, seed)
    assert (found.ids.dtype, found.probs.dtype, found.tail.dtype) == (np.int32, np.float32, np.float32)
    assert (found.ids[:, :1] >= 0).all()
    assert (found.probs[found.ids < 0] == 0).all()
    assert [set(one) for one in sets(found)] == [set(one) for one in sets(row)]
    assert {name: states.shape for name, states in found.hidden.items()} == {"a": (positions + 2, 5), "b": (positions + 2, 3)}
    np.testing.assert_allclose(found.probs.sum(1) + found.tail, 1, atol=2e-6)
    if bits == 32:
        assert sets(found) == sets(row)
        assert np.array_equal(found.tail, row.tail)
    elif k == 0:
        counts = [{i: round(p * draws) for i, p in one.items()} for one in sets(row)]
        assert [{i: round(p * draws) for i, p in one.items()} for one in sets(found)] == counts
        np.testing.assert_allclose(found.probs.sum(1), 1, atol=2e-6)
    else:
        assert_close(row, found, k, bits)


def assert_close(row: StoredRow, found: StoredRow, k: int, bits: int) -> None:
    """The bound of `scale`, with what dividing by the sum adds to it; of draws it is their mass that is rounded."""
    step = 1 / (2**bits - 1)
    for i, (one, other) in enumerate(zip(sets(row), sets(found), strict=True)):
        top = [int(c) for c in row.ids[i, :k] if c >= 0]
        mass = float(row.tail[i]) + sum(p for c, p in one.items() if c not in top)
        exact = np.array([*(one[c] for c in top), mass])
        read = np.array([*(other[c] for c in top), float(found.tail[i]) + sum(p for c, p in other.items() if c not in top)])
        root = np.maximum(exact, step**4) ** 0.25
        low, high = np.maximum(root - step / 2, step) ** 4 * (exact > 0), (root + step / 2) ** 4 * (exact > 0)
        assert (read <= high / low.sum() * (1 + 1e-5)).all()
        assert (read >= low / high.sum() * (1 - 1e-5)).all()


def test_counts_come_back_in_any_number_of_bits() -> None:
    of = header(k=4, draws=16, bits=8)
    row = target(of, 6)
    for one, other, ids in zip(sets(row), sets(again(row, of)), row.ids, strict=True):
        drawn = [int(c) for c in ids[4:] if c >= 0]
        assert [round(16 * one[c] / sum(one[d] for d in drawn)) for c in drawn] == [
            round(16 * other[c] / sum(other[d] for d in drawn)) for c in drawn
        ]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("gap", [60.0, 80.0, 87.0, 95.0, 101.0, 103.0, 110.0, 200.0])
def test_draws_of_a_vanishing_rest(gap: float, bits: Any) -> None:
    """Down to where float32 loses digits (1e-38, a gap of 87) and ends (1e-45, 103)."""
    z = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    z[:, 7] += gap
    ids, probs, tail = sparse_target(z, 1, 16, generator=torch.Generator().manual_seed(0))
    found = again(StoredRow(ids.int().numpy(), probs.numpy(), tail.numpy()), header(k=1, draws=16, bits=bits))
    assert [one[7] for one in sets(found)] == pytest.approx([1.0] * 5)
    assert (ids.shape[1] > 2) == (gap < 70)


def test_fewer_than_k_classes() -> None:
    ids = np.array([[4, -1, -1], [7, 2, 9]], np.int32)
    row = StoredRow(ids, np.array([[0.75, 0, 0], [0.5, 0.25, 0.125]], np.float32), np.array([0.25, 0.125], np.float32))
    found = again(row, header(k=3, bits=16))
    assert [set(one) for one in sets(found)] == [{4}, {2, 7, 9}]
    assert sets(found)[1][2] == pytest.approx(0.25, rel=1e-3)
    assert found.tail.tolist() == pytest.approx([0.25, 0.125], rel=1e-3)


def test_a_teacher_without_probabilities_is_refused() -> None:
    of = header()
    row = target(of, 4)
    row.probs[2] = np.nan
    with pytest.raises(DataError, match="nan at 1 of 4 positions"):
        again(row, of)
    with pytest.raises(DataError, match="sum up to"):
        again(replace(target(of, 4), tail=np.ones(4, np.float32)), of)


def test_other_draws_than_the_header_says_are_refused() -> None:
    with pytest.raises(AssertionError, match="so many draws"):
        again(target(header(k=0, draws=10), 4), header(k=0, draws=64))


@pytest.mark.parametrize(("k", "draws", "most"), [(50, 0, 95), (0, 64, 45)])
def test_positions_are_small(k: int, draws: int, most: float) -> None:
    """Where positions have nothing in common but their shape and a Zipf-like unigram, which is harder than language."""
    random, v = np.random.default_rng(0), 32_768
    of = header(num_classes=v, k=k, draws=draws)
    unigram = 1 / (np.arange(v) + 2.7)
    z = np.log(unigram) + random.gumbel(size=(64, v))
    order = np.argsort(-z, 1)[:, :300]
    p = np.arange(1, 301) ** -1.6
    p /= p.sum()
    if draws:
        counts = random.multinomial(draws, p, 64)
        ids, probs = np.where(counts > 0, order, -1), counts / draws
        by = np.argsort(-counts, 1)
        ids, probs = np.take_along_axis(ids, by, 1), np.take_along_axis(probs, by, 1)
        row = StoredRow(ids.astype(np.int32), probs.astype(np.float32), np.zeros(64, np.float32))
    else:
        tail = np.full(64, p[k:].sum(), np.float32)
        row = StoredRow(order[:, :k].astype(np.int32), np.tile(p[:k], (64, 1)).astype(np.float32), tail)
    size = len(Coder(of, np.arange(v, dtype=np.int32)).encode(row)) / 64
    assert size < most
