import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss  # type: ignore[import-untyped]
from torch import nn
from torch.nn import functional as F

from distill.losses import measure as module
from distill.losses.measure import measure
from distill.types import IGNORE_INDEX, MixedTarget, Outputs, SparseTarget
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


def several(case: Case) -> tuple[tuple[Outputs, Outputs], torch.Tensor, list[torch.Tensor]]:
    """Two teachers, weights of each position, and the teachers' logits at the valid positions in float64."""
    torch.manual_seed(1)
    parts = case.teacher(), Outputs(torch.randn(*case.labels.shape, 3), linear(2 * torch.randn(case.num_classes + 2, 3)))
    weights = torch.rand(*case.labels.shape, 2, dtype=torch.float64)
    valid = case.labels != IGNORE_INDEX
    logits = [part.head(part.features).detach().double()[valid][:, : case.num_classes] for part in parts]
    return parts, weights / weights.sum(-1, keepdim=True), logits


def test_against_a_mean_of_teachers() -> None:
    case = Case.random(shape=(4, 25), num_classes=5)
    parts, weights, logits = several(case)
    w = weights[case.labels != IGNORE_INDEX]
    p = w[:, :1] * logits[0].softmax(-1) + w[:, 1:] * logits[1].softmax(-1)
    found = measure(case.student(), MixedTarget(parts, weights, "probabilities"), case.labels, 5)
    mean = Outputs(torch.zeros(*case.labels.shape, 5, dtype=torch.float64), nn.Identity())
    mean.features[case.labels != IGNORE_INDEX] = p.log()
    true = measure(case.student(), mean, case.labels, 5)
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in true.items()}, rel=1e-5)
    y = case.labels[case.labels != IGNORE_INDEX]
    assert found["teacher_loss"].item() == pytest.approx(log_loss(y, p, labels=range(5), normalize=False), rel=1e-5)


def test_against_teachers_apart_each_counts_by_its_weight() -> None:
    case = Case.random(shape=(4, 25), num_classes=5)
    parts, weights, logits = several(case)
    valid = case.labels != IGNORE_INDEX
    q = (case.student_features.double() @ case.student_weight.double().T)[valid][:, :5]
    w, y = weights[valid].unbind(-1), case.labels[valid]
    found = measure(case.student(), MixedTarget(parts, weights, "apart"), case.labels, 5)
    kl = [F.kl_div(q.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1) for t in logits]
    true = {
        "teacher_loss": sum((F.cross_entropy(t, y, reduction="none") * w).sum() for t, w in zip(logits, w, strict=True)),
        "teacher_accuracy": sum(((t.argmax(-1) == y) * w).sum() for t, w in zip(logits, w, strict=True)),
        "kl": sum((each * w).sum() for each, w in zip(kl, w, strict=True)),
        "agreement": sum(((t.argmax(-1) == q.argmax(-1)) * w).sum() for t, w in zip(logits, w, strict=True)),
    }
    assert {k: found[k].item() for k in true} == pytest.approx({k: float(v) for k, v in true.items()}, rel=1e-5)
    plain = measure(case.student(), None, case.labels, 5)
    assert {k: found[k] for k in plain} == plain  # the student's own figures are whole


def test_a_target_of_some_classes_is_no_measure() -> None:
    case = Case.random()
    target = SparseTarget(torch.zeros(2, 7, 1, dtype=torch.long), torch.ones(2, 7, 1), torch.zeros(2, 7))
    with pytest.raises(AssertionError, match="all classes"):
        measure(case.student(), target, case.labels, case.num_classes)
