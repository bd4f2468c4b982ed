"""Documents are cut out of batches and put back, by hand-computed cases."""

import numpy as np
import torch

from distill.teachers.prompts import Known, prompts, requests, target
from distill.types import IGNORE_INDEX as NO


def batch(**rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in rows.items()}


def cut(given: dict[str, torch.Tensor]) -> list[tuple[list[int], int, list[int], list[int]]]:
    return [(p.tokens, p.row, p.positions.tolist(), p.entries.tolist()) for p in prompts(given)]


def test_a_row_is_asked_up_to_its_last_label() -> None:
    given = batch(input_ids=[[5, 6, 7, 8, 9]], labels=[[NO, 7, NO, 9, NO]])
    assert cut(given) == [([5, 6, 7, 8, 9], 0, [1, 3], [2, 4])]


def test_the_label_of_the_last_position_comes_after_it() -> None:
    given = batch(input_ids=[[5, 6, 7]], labels=[[6, 7, 30]])
    assert cut(given) == [([5, 6, 7, 30], 0, [0, 1, 2], [1, 2, 3])]


def test_padding_on_either_side_is_left_out() -> None:
    given = batch(
        input_ids=[[5, 6, 1, 1], [1, 1, 5, 6]],
        labels=[[6, 9, NO, NO], [NO, NO, 6, 9]],
        attention_mask=[[1, 1, 0, 0], [0, 0, 1, 1]],
    )
    assert cut(given) == [([5, 6, 9], 0, [0, 1], [1, 2]), ([5, 6, 9], 1, [2, 3], [1, 2])]


def test_packed_documents_are_prompts_of_their_own() -> None:
    given = batch(
        input_ids=[[5, 6, 7, 8, 9, 1], [2, 3, 4, 5, 6, 7]],
        labels=[[6, 7, NO, 9, 33, NO], [NO] * 6],
        position_ids=[[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]],
    )
    assert cut(given) == [([5, 6, 7], 0, [0, 1], [1, 2]), ([8, 9, 33], 0, [3, 4], [1, 2])]


def test_a_row_that_begins_inside_a_document_is_one() -> None:
    given = batch(input_ids=[[5, 6, 7]], labels=[[6, 7, 8]], position_ids=[[4, 5, 0]])
    assert cut(given) == [([5, 6, 7], 0, [0, 1], [1, 2]), ([7, 8], 0, [2], [1])]


def test_requests_hold_so_many_tokens() -> None:
    given = batch(input_ids=[[5, 6]] * 5, labels=[[6, 7]] * 5)
    sent = list(prompts(given))  # three tokens each
    assert [len(group) for group in requests(sent, 6)] == [2, 2, 1]
    assert [len(group) for group in requests(sent, 8)] == [2, 2, 1]
    assert [len(group) for group in requests(sent, 1)] == [1] * 5
    assert [p for group in requests(sent, 7) for p in group] == sent
    assert requests([], 7) == []


def test_what_is_known_goes_back_to_its_positions() -> None:
    given = batch(input_ids=[[5, 6, 7, 8]], labels=[[NO, 7, NO, 9]], position_ids=[[0, 1, 0, 1]])
    sent = list(prompts(given))
    known = [
        Known(np.array([[3, 4]]), np.array([[0.5, 0.25]]), np.array([0.25])),
        Known(np.array([[9, -1]]), np.array([[0.75, 0.0]]), np.array([0.25])),
    ]
    found = target(given, sent, known, 2)
    assert found.ids.tolist() == [[[0, -1], [3, 4], [0, -1], [9, -1]]]
    assert found.probs.tolist() == [[[0, 0], [0.5, 0.25], [0, 0], [0.75, 0]]]
    assert found.tail.tolist() == [[1, 0.25, 1, 0.25]]
    assert found.temperature == 1.0
    assert (found.ids.dtype, found.probs.dtype, found.tail.dtype) == (torch.int64, torch.float32, torch.float32)
