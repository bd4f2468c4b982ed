"""Interrupt a real trainer anywhere, and see that every later optimizer step is on the samples it would have been on."""

import pytest
import pytorch_lightning as pl
import torch

from distill.data.resume import realign
from tests.data.helpers import RowsData, numbered


class Recorder(pl.LightningModule):
    def __init__(self, asks_for_steps=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.asks_for_steps = asks_for_steps
        self.open, self.steps = [], []

    def training_step(self, batch, batch_idx):
        self.open.append(sorted(batch["sample_ids"].tolist()))
        return (self.weight * batch["labels"].float().sum()).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(sorted(i for batch in self.open for i in batch))
        self.open = []

    def configure_optimizers(self):
        if self.asks_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint):
        self.trainer.datamodule.realign(checkpoint)


class SaveAt(pl.Callback):
    def __init__(self, count, path):
        self.count, self.path, self.seen = count, path, 0

    def on_train_batch_end(self, trainer, *_):
        self.seen += 1
        if self.seen == self.count:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(batch_size=1, window=2, callbacks=(), ckpt_path=None, num_workers=0, module=None, val=None, **trainer):
    module = module or Recorder()
    data = RowsData(numbered(13), val=val, batch_size=batch_size, seed=4, num_workers=num_workers)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(**{"max_epochs": 3, **quiet, **trainer}, accumulate_grad_batches=window, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.steps


@pytest.fixture(scope="module")
def whole():
    steps = fit()
    assert len(steps) == 3 * 6
    assert all(len(step) == 2 for step in steps)
    return steps


@pytest.mark.parametrize("until", [{"max_epochs": 3}, {"max_steps": 18, "max_epochs": -1}])
@pytest.mark.parametrize("saved_at", [1, 2, 5, 6, 11, 12, 13, 17, 24])
def test_resume_anywhere(whole, tmp_path, saved_at, until):
    path = tmp_path / "at.ckpt"
    before = fit(callbacks=[SaveAt(saved_at, path)], **until)
    assert before == whole[: saved_at // 2]
    assert fit(ckpt_path=path, **until) == whole[saved_at // 2 :]


@pytest.mark.parametrize("saved_at", [6, 7, 12])
@pytest.mark.parametrize(("batch_size", "window"), [(2, 1), (1, 2)])
def test_resume_at_another_split_of_the_same_global_batch(whole, tmp_path, saved_at, batch_size, window):
    path = tmp_path / "at.ckpt"
    fit(callbacks=[SaveAt(saved_at, path)])
    assert fit(batch_size, window, ckpt_path=path) == whole[saved_at // 2 :]


def test_resume_with_workers(whole, tmp_path):
    path = tmp_path / "at.ckpt"
    fit(callbacks=[SaveAt(6, path)], num_workers=2)
    assert fit(ckpt_path=path, num_workers=1) == whole[3:]


@pytest.mark.parametrize("saved_at", [6, 12])
def test_resume_where_the_module_asks_for_the_number_of_steps(whole, tmp_path, saved_at):
    """Lightning then asks for the loader before it has read the position, and never hands it over."""
    path = tmp_path / "at.ckpt"
    fit(callbacks=[SaveAt(saved_at, path)], module=Recorder(asks_for_steps=True))
    assert fit(ckpt_path=path, module=Recorder(asks_for_steps=True)) == whole[saved_at // 2 :]


def test_resume_from_the_end_of_an_epoch(whole, tmp_path):
    class SaveEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    fit(callbacks=[SaveEpoch()], max_epochs=2)
    assert fit(ckpt_path=tmp_path / "epoch.ckpt") == whole[12:]


def test_resume_with_validation_inside_the_epoch(whole, tmp_path):
    path = tmp_path / "at.ckpt"
    more = {"val": numbered(3), "val_check_interval": 3}
    fit(callbacks=[SaveAt(9, path)], **more)
    assert fit(ckpt_path=path, **more) == whole[4:]


def test_reloaded_loaders_go_on(whole):
    assert fit(reload_dataloaders_every_n_epochs=1) == whole


def test_a_second_fit_starts_again(whole):
    module, data = Recorder(), RowsData(numbered(13), batch_size=1, seed=4)
    for _ in range(2):
        trainer = pl.Trainer(
            max_epochs=1,
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        trainer.fit(module, datamodule=data)
    assert module.steps == whole[:6] * 2
    assert data.reads == 1


def test_limited_epochs_go_on_with_the_next_epoch(whole, tmp_path):
    limited = fit(limit_train_batches=4)
    assert limited == [*whole[0:2], *whole[6:8], *whole[12:14]]
    path = tmp_path / "at.ckpt"
    fit(callbacks=[SaveAt(4, path)], limit_train_batches=4)
    assert fit(ckpt_path=path, limit_train_batches=4) == limited[2:]


def test_overfit_batches_repeats_the_same_rows(whole):
    assert fit(overfit_batches=2) == [whole[0]] * 3


def test_a_right_count_is_left_alone():
    checkpoint = {"loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": {}, "current": {"ready": 4, "completed": 3}}}}}
    realign(checkpoint, 4)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"] == {"ready": 4, "completed": 3}
