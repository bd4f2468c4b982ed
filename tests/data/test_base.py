import pytest

from distill.types import ConfigError, DataError
from tests.data.helpers import RowsData, numbered


def test_nothing_is_read_before_setup_and_only_once():
    data = RowsData(numbered(4))
    assert data.reads == 0
    data.setup("fit")
    data.setup("validate")
    assert data.reads == 1


def test_without_a_trainer_the_window_is_one():
    data = RowsData(numbered(10), numbered(3), batch_size=4, val_batch_size=2)
    data.setup()
    assert [len(batch["sample_ids"]) for batch in data.train_dataloader()] == [4, 4]
    assert [batch["sample_ids"].tolist() for batch in data.val_dataloader()] == [[0, 1], [2]]
    assert data.test_dataloader() == []


def test_summary():
    data = RowsData(numbered(3), numbered(2))
    data.setup()
    data.skipped["too long"] = 1200
    assert data.summary() == {
        "rows": "train 3 · val 2",
        "valid positions": "6",
        "classes": "100",
        "fingerprint": data.fingerprint,
        "skipped": "1,200 × too long",
    }


@pytest.mark.parametrize(("key", "value"), [("batch_size", 0), ("val_batch_size", -1), ("num_workers", -1)])
def test_numbers_out_of_range(key, value):
    with pytest.raises(ConfigError, match=f"data.{key} must be at least . got {value}".replace("least .", "least .,")):
        RowsData(numbered(3), **{key: value})


def test_no_rows_left():
    class Empty(RowsData):
        def read(self):
            splits = super().read()
            self.skipped["too long"] = 2
            return splits._replace(val=splits.train.select([]))

    with pytest.raises(DataError, match="no row of the val data can be used; skipped: 2 × too long"):
        Empty(numbered(2)).setup()
