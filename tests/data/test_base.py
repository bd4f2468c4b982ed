import pytest
import pytorch_lightning as pl

from distill.types import ConfigError, DataError
from tests.data.helpers import RowsData, numbered


def test_nothing_is_read_before_setup_and_only_once():
    data = RowsData(numbered(4), numbered(2))
    assert data.reads == 0
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    assert data.reads == 1


def test_a_stage_without_rows():
    data = RowsData(numbered(4))
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(DataError, match=r"no validation data; set data.val_data, or data.val_fraction above 0"):
        data.setup("validate")
    with pytest.raises(DataError, match=r"no test data; set data.test_data"):
        data.setup("test")


def test_one_process_prepares_the_data_before_setup():
    """Through Lightning itself: a rank other than 0 must not be the first to read."""
    reads = []

    class Watched(RowsData):
        def prepare_data(self):
            super().prepare_data()
            reads.append(("prepared", self.reads))

        def setup(self, stage=None):
            reads.append((stage, self.reads))
            super().setup(stage)

    class Nothing(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            raise AssertionError("there are no batches")

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(DataError, match="no test data"):
        trainer.test(Nothing(), datamodule=Watched(numbered(4)))
    assert reads == [(None, 0), ("prepared", 1), ("test", 1)]


def test_without_a_trainer_the_window_is_one():
    data = RowsData(numbered(10), numbered(3), batch_size=4, val_batch_size=2)
    data.setup()
    assert [len(batch["sample_ids"]) for batch in data.train_dataloader()] == [4, 4]
    assert [batch["input_ids"][:, 0].tolist() for batch in data.val_dataloader()] == [[0, 1], [2]]
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
