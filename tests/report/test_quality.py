"""Measuring on the validation data, against scikit-learn and by hand."""

from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from distill.report.quality import evaluate, retention, student_part, teacher_part
from tests import pair


def test_figures_agree_with_scikit_learn_and_leave_the_mode_alone(tmp_path: Path) -> None:
    data, module = pair.data(tmp_path, batch_size=4), pair.module(tmp_path)
    trainer = pair.trainer(max_steps=1, limit_val_batches=1.0)
    trainer.fit(module, data)
    module.student.train()
    got = evaluate(trainer, module)
    assert module.student.training
    probabilities, classes = [], []
    module.student.eval()
    for batch in data.val_dataloader():
        valid = batch["labels"] != -100
        with torch.no_grad():
            logits = module.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        probabilities.append(logits[valid].double().softmax(-1))
        classes.append(batch["labels"][valid])
    p, y = torch.cat(probabilities).numpy(), torch.cat(classes).numpy()
    assert got["count"] == len(y)
    assert got["loss"] == pytest.approx(log_loss(y, p, labels=range(16)), rel=1e-5)
    assert got["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)))


def test_the_limit_is_lightnings(tmp_path: Path) -> None:
    data, module = pair.data(tmp_path, batch_size=2), pair.module(tmp_path)
    trainer = pair.trainer(max_steps=1, limit_val_batches=2)
    trainer.fit(module, data)
    first_two = [b for b, _ in zip(data.val_dataloader(), range(2), strict=False)]
    assert evaluate(trainer, module)["count"] == sum(int((b["labels"] != -100).sum()) for b in first_two)


def test_parts_of_one_measurement() -> None:
    both = {"count": 10.0, "loss": 2.0, "accuracy": 0.3, "teacher_loss": 1.0, "teacher_accuracy": 0.6, "kl": 0.5, "agreement": 0.4}
    assert student_part(both) == {"count": 10.0, "loss": 2.0, "accuracy": 0.3, "kl": 0.5, "agreement": 0.4}
    assert teacher_part(both) == {"count": 10.0, "loss": 1.0, "accuracy": 0.6, "kl": 0.0, "agreement": 1.0}
    alone, before = student_part(both), {"count": 10.0, "loss": 1.5, "accuracy": 0.4}
    assert teacher_part(alone, before) == before
    assert teacher_part(alone, before | {"count": 11.0}) == {}, "figures of other rows are not put beside the student's"
    assert teacher_part(alone) == {}
    assert retention(student_part(both), teacher_part(both)) == pytest.approx(0.5)
    assert retention({"accuracy": 0.5}, {"accuracy": 0.0}) != retention({"accuracy": 0.5}, {"accuracy": 0.0}), "nan, not a division by zero"
