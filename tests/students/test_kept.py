"""What stays, by hand."""

import torch

from distill.compress.importance import Importance
from distill.students.kept import best, kept_of, uniform
from distill.students.sizes import Sizes


def test_groups_first_then_the_queries_in_them() -> None:
    scores = Importance(
        neurons=[torch.tensor([1.0, 3.0, 2.0]), torch.tensor([9.0, 0.0, 8.0])],
        heads=[torch.zeros(6), torch.tensor([0.0, 1.0, 5.0, 9.0, 7.0, 4.0])],  # groups of two: 1, 14, 11
        channels=torch.tensor([0.1, 0.4, 0.3, 0.2]),
        energies={"norm": torch.tensor([1.0, 5.0, 3.0, 1.0], dtype=torch.float64)},
    )
    kept = kept_of(scores, Sizes(2, 4, 3, 6, 3), Sizes(1, 2, 2, 2, 2), [1])
    assert kept.layers == [1]
    assert kept.channels.tolist() == [1, 2]
    assert kept.energy == {"norm": 0.8}
    assert [groups.tolist() for groups in kept.groups] == [[1, 2]]
    assert [heads.tolist() for heads in kept.heads] == [[1, 2]], "9 and 7, numbered among the four that the groups leave"
    assert [neurons.tolist() for neurons in kept.neurons] == [[0, 2]]


def test_of_equal_scores_the_first_stay() -> None:
    assert best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_first_and_last_stay() -> None:
    assert [uniform(12, n) for n in (1, 2, 4, 12)] == [[0], [0, 11], [0, 4, 7, 11], list(range(12))]
