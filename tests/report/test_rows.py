from pathlib import Path

import numpy as np
import pytest

from distill.report import rows
from distill.types import DataError
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
