"""Common spans of two tokenizations, against a walk from the definition, document by document."""

from itertools import accumulate, pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.spans import Alignment, Stream, align

Cut = tuple[list[int], list[bool]]  # where the tokens of a text end, and which of them are usable


def slow(ours: Cut, theirs: Cut) -> list[tuple[list[int], list[int]]]:
    """The spans of one text, as the indices of the tokens of either side."""
    cuts = sorted(set(ours[0]) & set(theirs[0]))
    found = []
    for start, end in pairwise([-1, *cuts]):
        sides = [[i for i, last in enumerate(ends) if start < last <= end] for ends, _ in (ours, theirs)]
        if all(usable[i] for (_, usable), side in zip((ours, theirs), sides, strict=True) for i in side):
            found.append((sides[0], sides[1]))
    return found


def streams(texts: list[tuple[Cut, Cut]]) -> tuple[Stream, Stream, np.ndarray]:
    sides: tuple[list[int], list[int]] = ([], [])
    usable: tuple[list[bool], list[bool]] = ([], [])
    closes, base = [], 0
    for pair in texts:
        for (ends, use), all_ends, all_use in zip(pair, sides, usable, strict=True):
            all_ends += [base + end for end in ends]
            all_use += use
        base += max([0, *pair[0][0], *pair[1][0]]) + 2
        closes.append(base - 1)
    made = [
        Stream(np.array(e, np.int64), 100 + np.arange(len(e)), 1000 + np.arange(len(e)), np.array(u, bool))
        for e, u in zip(sides, usable, strict=True)
    ]
    return made[0], made[1], np.array(closes, np.int64)


@st.composite
def cut_text(draw: st.DrawFn) -> tuple[Cut, Cut]:
    size = draw(st.integers(1, 25))
    made = []
    for side in range(2):
        inner = draw(st.sets(st.integers(1, size)))
        ends = sorted(inner | ({size} if draw(st.booleans()) else set()))
        if side and draw(st.booleans()):
            ends = [0, *ends]  # a token without bytes
        made.append((ends, draw(st.lists(st.sampled_from([True, True, True, False]), min_size=len(ends), max_size=len(ends)))))
    return made[0], made[1]


@settings(max_examples=150, deadline=None)
@given(st.lists(cut_text(), max_size=5))
def test_any_cuts(texts: list[tuple[Cut, Cut]]) -> None:
    ours, theirs, closes = streams(texts)
    found = align(ours, theirs, closes)
    expected: list[tuple[list[int], list[int]]] = []
    counts = [list(accumulate((len(pair[side][0]) for pair in texts), initial=0)) for side in range(2)]
    for d, pair in enumerate(texts):
        expected += [([i + counts[0][d] for i in a], [j + counts[1][d] for j in b]) for a, b in slow(*pair)]
    assert found.student_at.tolist() == [100 + i for a, _ in expected for i in a]
    assert found.student_span.tolist() == [k for k, (a, _) in enumerate(expected) for _ in a]
    assert found.teacher_at.tolist() == [100 + j for _, b in expected for j in b]
    assert found.teacher_span.tolist() == [k for k, (_, b) in enumerate(expected) for _ in b]
    assert found.teacher_labels.tolist() == [1000 + j for _, b in expected for j in b]


def test_by_hand() -> None:
    # "nave" as na|ve and n|av|e, then "x" as x and x: cuts at 4 and 5
    ours, theirs, closes = streams([(([2, 4, 5], [True] * 3), ([1, 3, 4, 5], [True] * 4))])
    found = align(ours, theirs, closes)
    assert found.student_span.tolist() == [0, 0, 1]
    assert found.teacher_span.tolist() == [0, 0, 0, 1]


def test_taps_there_and_back() -> None:
    found = Alignment(*(torch.arange(i) for i in range(5)))
    again = Alignment.of(found.taps() | {"another": torch.zeros(1)})
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
