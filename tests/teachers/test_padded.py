"""Rows are named by their content alone, and lie in a batch where their positions are."""

import numpy as np
import torch

from distill.teachers.padded import padded, places
from distill.teachers.store import StoredRow

IDS = [[5, 6, 7, 8], [9, 5, 0, 0]]
LABELS = [[-100, 7, 8, -100], [5, -100, -100, -100]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0]]


def batch(**changed: object) -> dict[str, torch.Tensor]:
    given = {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK} | changed
    return {name: torch.tensor(value) for name, value in given.items() if value is not None}


def test_a_name_is_of_the_tokens_the_documents_and_where_labels_are() -> None:
    keys = places(batch()).keys
    alone = places({"input_ids": torch.tensor([IDS[1][:2]]), "labels": torch.tensor([LABELS[1][:2]])}).keys
    assert alone == keys[1:], "padding is no content"
    assert places(batch(labels=[[-100, 3, 3, -100], LABELS[1]])).keys == keys, "nor is what the label is"
    assert places(batch(labels=[[6, 7, 8, -100], LABELS[1]])).keys[0] != keys[0]
    whole, cut = ({"attention_mask": None, "position_ids": [p, [0, 1, 2, 3]]} for p in ([0, 1, 2, 3], [0, 1, 0, 1]))
    assert places(batch(**whole)).keys[0] == keys[0]
    assert places(batch(**cut)).keys[0] != keys[0]
    assert places(batch(labels=[[1], [0]])).keys == places(batch(labels=[[0], [2]])).keys


def test_rows_that_name_different_teachers_have_different_names() -> None:
    routes = [[0, 0, 0, 0], [1, 1, -1, -1]]
    keys = places(batch(route=routes)).keys
    alone = {"input_ids": torch.tensor([IDS[1][:2]]), "labels": torch.tensor([LABELS[1][:2]]), "route": torch.tensor([[1, 1]])}
    assert places(alone).keys == keys[1:], "padding is no content"
    assert not set(keys) & {*places(batch()).keys, *places(batch(route=[[1, 1, 1, 1], [0, 0, -1, -1]])).keys}
    one_label = {"labels": [[1], [0]]}
    assert places(batch(route=[[0], [1]], **one_label)).keys[0] != places(batch(route=[[1], [1]], **one_label)).keys[0]


def test_rows_are_laid_where_their_labels_and_tokens_are() -> None:
    row = lambda *ids: np.array(ids, np.int32)
    first = StoredRow(row([4, 2, -1, -1], [3, -1, -1, -1]), np.float32([[0.5, 0.25, 0, 0], [1, 0, 0, 0]]), np.float32([0.25, 0]), hidden(4))
    second = StoredRow(row([1, 0, 3]), np.float32([[0.5, 0.25, 0.25]]), np.float32([0]), hidden(2))
    found = padded([first, second], places(batch()))
    assert found.ids.shape == (2, 4, 3), "as wide as the widest position, not as the rows were written"
    assert found.ids[0, 1].tolist() == [4, 2, -1]
    assert found.ids[0, 2].tolist() == [3, -1, -1]
    assert found.ids[1, 0].tolist() == [1, 0, 3]
    assert found.probs[0, 1].tolist() == [0.5, 0.25, 0.0]
    assert found.tail[0].tolist() == [1.0, 0.25, 0.0, 1.0]
    assert found.hidden["h"][0].tolist() == [[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]
    assert found.hidden["h"][1].tolist() == [[0.0, 0.5], [1.0, 1.5], [0.0, 0.0], [0.0, 0.0]]
    assert found.on(torch.device("cpu"), 2.0, []).taps == {}
    assert found.on(torch.device("cpu"), 2.0, []).temperature == 2.0


def hidden(length: int) -> dict[str, np.ndarray]:
    return {"h": np.arange(length, dtype=np.float32)[:, None] + np.float32([0, 0.5])}
