import torch
from torch import Tensor, nn

from distill.teachers.rows import in_parts, some_rows, spread_rows
from distill.types import Outputs, SparseTarget

BATCH = {"input_ids": torch.arange(15).view(5, 3), "labels": torch.arange(5)[:, None], "num_valid": torch.tensor(5)}


def test_some_rows_of_what_has_rows() -> None:
    some = some_rows(BATCH, torch.tensor([3, 1]))
    assert some["input_ids"].tolist() == [[9, 10, 11], [3, 4, 5]]
    assert some["labels"].tolist() == [[3], [1]]
    assert some["num_valid"].item() == 5
    assert some_rows(BATCH, slice(4, 9))["labels"].tolist() == [[4]]


def test_in_parts_is_all_rows_in_order() -> None:
    seen: list[list[int]] = []
    head = nn.Identity()

    def run(batch: dict[str, Tensor], taps: object) -> Outputs:
        seen.append(batch["labels"][:, 0].tolist())
        features = 2.0 * batch["input_ids"][..., None]
        return Outputs(features, head, {"tap": features[..., 0] + 1})

    out = in_parts(run, BATCH, iter(["tap"]), 2)  # type: ignore[arg-type]
    assert seen == [[0, 1], [2, 3], [4]]
    assert out.features.flatten().tolist() == [2.0 * i for i in range(15)]
    assert out.taps["tap"].flatten().tolist() == [2.0 * i + 1 for i in range(15)]
    assert out.head is head


def test_other_rows_are_finite() -> None:
    out = spread_rows(Outputs(torch.ones(2, 3, 4), nn.Identity()), torch.tensor([0, 2]), 3)
    assert out.features.sum((1, 2)).tolist() == [12, 0, 12]
    target = SparseTarget(torch.tensor([[[5, 2, -1]]]), torch.tensor([[[0.5, 0.25, 0.0]]]), torch.tensor([[0.25]]), 2.0)
    spread = spread_rows(target, torch.tensor([1]), 2)
    assert spread.ids.tolist() == [[[0, -1, -1]], [[5, 2, -1]]]
    assert spread.probs.tolist() == [[[1, 0, 0]], [[0.5, 0.25, 0]]]
    assert spread.tail.tolist() == [[0], [0.25]]
    assert spread.temperature == 2.0


def test_all_rows_are_left_as_they_are() -> None:
    target = Outputs(torch.ones(2, 3, 4), nn.Identity())
    assert spread_rows(target, torch.tensor([0, 1]), 2) is target
