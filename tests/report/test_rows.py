from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill.data.packing import pad
from distill.report import rows
from distill.report.evidence import Subject
from distill.report.observe import observe
from distill.types import DataError, Outputs
from tests.report.made import observed


def test_there_and_back_sums_a_row_at_a_time(tmp_path: Path) -> None:
    seen = observed([1, 1, 0, 1], [1, 0, 0, 1], per_row=2, nll=[1.0, 2.0, 3.0, 4.0])
    rows.save(tmp_path, seen)
    kept = rows.load(tmp_path)
    assert kept.count.tolist() == [2, 2]
    assert not kept.single
    student = kept.sums["student distilled"]
    assert student["nll"].tolist() == [3.0, 7.0]
    assert student["correct"].tolist() == [1, 1]
    assert student["kl"].tolist() == [0.5, 0.5]
    assert student["agreement"].tolist() == [1, 2]  # both take the class after the label at the third position
    assert set(kept.sums["teacher"]) == {"nll", "correct"}
    assert kept.digest == rows.digest(seen)


def test_the_digest_is_of_labels_and_of_where_rows_end() -> None:
    one, same, cut, longer = (rows.digest(observed([1] * n, [0] * n, per)) for n, per in ((4, 2), (4, 2), (4, 4), (6, 2)))
    assert one == same
    assert len({one, cut, longer}) == 3


def test_the_digest_is_of_the_tokens_too_and_not_of_how_they_were_batched() -> None:
    """Files that are sorted by class have the same labels, whatever rows are held out."""
    says = {"student": Subject(lambda batch: Outputs(torch.zeros(len(batch["labels"]), 1, 3), nn.Identity()))}

    def digest(texts: list[list[int]], size: int) -> str:
        made = []
        for part in (texts[i : i + size] for i in range(0, len(texts), size)):
            rows_of = [{"input_ids": ids, "labels": [0] * len(ids)} for ids in part]
            made.append({**pad(rows_of, 7), "labels": torch.tensor([[texts.index(ids) // 2] for ids in part])})
        return rows.digest(observe(says, made, 3, torch.device("cpu"), len(texts)))

    texts = [[1, 2, 3], [4], [5, 6], [7, 7]]
    assert digest(texts, 4) == digest(texts, 1)
    assert digest(texts, 4) != digest([[1, 2, 3], [4], [5, 6], [7, 8]], 4)


def test_a_row_without_a_position_counts_nothing(tmp_path: Path) -> None:
    seen = observed([1, 1], [1, 0])
    object.__setattr__(seen, "rows", np.array([0, 2]))
    assert rows.of(seen).count.tolist() == [1, 0, 1]


def test_none_or_a_damaged_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no '.*report_rows.npz', which `distill report` writes"):
        rows.load(tmp_path)
    rows.save(tmp_path, observed([1], [1]), "-step-1")
    path = tmp_path / "report_rows-step-1.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot be read \(.*\); `distill report` writes it again"):
        rows.load(tmp_path, "-step-1")
    np.savez(tmp_path / "report_rows.npz", count=np.ones(1))
    with pytest.raises(DataError, match="cannot be read"):
        rows.load(tmp_path)
