import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss  # type: ignore[import-untyped]
from torch import nn
from torch.nn import functional as F

from distill.losses import measure as module
from distill.losses.measure import measure
from distill.types import IGNORE_INDEX, Outputs
from tests.losses.dense import Case, linear


def expected(case: Case) -> dict[str, float]:
    """The measures by scikit-learn and dense torch in float64."""
    valid, v = case.labels != IGNORE_INDEX, case.num_classes
    student = (case.student_features.double() @ case.student_weight.double().T)[valid][:, :v]
    teacher = (case.teacher_features.double() @ case.teacher_weight.double().T)[valid][:, :v]
    y, n = case.labels[valid], int(valid.sum())
    return {
        "count": n,
        "loss": log_loss(y, student.softmax(-1), labels=range(v), normalize=False),
        "accuracy": accuracy_score(y, student.argmax(-1), normalize=False),
        "teacher_loss": log_loss(y, teacher.softmax(-1), labels=range(v), normalize=False),
        "teacher_accuracy": accuracy_score(y, teacher.argmax(-1), normalize=False),
        "kl": F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum").item(),
        "agreement": accuracy_score(teacher.argmax(-1), student.argmax(-1), normalize=False),
    }


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_against_sklearn(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_size", lambda *_: chunk)
    case = Case.random(shape=(4, 25), num_classes=5)
    found = measure(case.student(), case.teacher(), case.labels, case.num_classes)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected(case), rel=1e-5)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in found.values())


def test_without_a_teacher() -> None:
    case = Case.random(shape=(4, 25), num_classes=5)
    found = measure(case.student(), None, case.labels, case.num_classes)
    assert list(found) == ["count", "loss", "accuracy"]
    assert found["loss"].item() == pytest.approx(expected(case)["loss"], rel=1e-5)


def test_kl_is_at_temperature_one_and_zero_for_the_same_model() -> None:
    case = Case.random(shape=(4, 25))
    found = measure(case.student(), case.student(), case.labels, case.num_classes)
    assert found["kl"].item() == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == found["count"]


def test_all_masked_gives_zeros() -> None:
    case = Case.random(mask="all")
    assert all(value.item() == 0 for value in measure(case.student(), case.teacher(), case.labels, case.num_classes).values())


def test_columns_that_pad_the_vocabulary_win_no_prediction() -> None:
    features, labels = torch.ones(1, 3, 1), torch.tensor([[1, 1, 0]])
    head = linear(torch.tensor([[0.0], [1.0], [9.0]]))  # the third row pads
    found = measure(Outputs(features, head), None, labels, 2)
    assert found["accuracy"].item() == 2


def test_sums_add_up_over_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 9), torch.randint(9, (6, 5))
    whole = measure(Outputs(logits, nn.Identity()), None, labels, 9)
    parts = [measure(Outputs(x, nn.Identity()), None, y, 9) for x, y in zip(logits.split(2), labels.split(2), strict=True)]
    for name, value in whole.items():
        assert value.item() == pytest.approx(np.sum([part[name].item() for part in parts]))
