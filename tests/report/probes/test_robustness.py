import json

import numpy as np
import pytest
import torch

from distill.metrics.bootstrap import Resampler
from distill.metrics.margin import radii
from distill.report.evidence import NotMeasured
from distill.report.probes import robustness
from distill.report.probes.linear_head import LinearHead, linear_head
from distill.report.probes.perturb import Probe, labels_and_rows
from distill.report.probes.robustness import STRENGTHS, difference, kept, margin, measure
from distill.tasks import CausalLM, SequenceClassification
from distill.teachers.quantise import quantise
from tests import models
from tests.report.disturbed import CPU, evidence, rows, texts, told


def _pair(disturbed: list[float], clean: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(disturbed), np.array(clean)


def test_what_is_kept_is_measured_against_the_models_own_accuracy():
    resampler = Resampler(np.arange(4))
    student, teacher = _pair([0.5, 0, 0.5, 0], [1, 0, 1, 0]), _pair([1, 0.5, 1, 0.5], [1, 1, 1, 1])
    assert kept(resampler, student).value == 0.5
    assert kept(resampler, teacher).value == 0.75
    assert difference(resampler, student, teacher).value == -0.25


def test_the_difference_is_paired():
    rng = np.random.default_rng(0)
    clean = rng.random(400).round()
    disturbed = clean * rng.random(400)
    same = difference(Resampler(np.arange(400)), (disturbed, clean), (disturbed, clean))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = difference(Resampler(np.arange(400)), (disturbed - 0.1 * clean, clean), (disturbed, clean))
    assert worse.value == pytest.approx(-0.1)
    assert worse.high == pytest.approx(-0.1)  # every resample says the same
    draws = []  # the same by hand, from resamples of another generator
    for _ in range(2000):
        rows_of = rng.integers(0, 400, 400)
        a, b = disturbed[rows_of].sum() / clean[rows_of].sum(), clean[rows_of].mean()
        draws.append(a - (disturbed[rows_of] ** 2).sum() / (400 * b))
    found = difference(Resampler(np.arange(400)), (disturbed, clean), (disturbed**2, clean))
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)


@pytest.fixture(scope="module")
def language_model() -> dict:
    teacher, student = models.causal_lm(seed=0), models.causal_lm(seed=1)
    return measure(evidence({"teacher": teacher, "student": student}, told(teacher, rows(count=12))))


def test_a_run_is_put_to_every_test(language_model: dict):
    figures = json.loads(json.dumps(language_model, allow_nan=False))
    assert figures["rows"] == {"attacked": 12, "disturbed": 12}
    assert figures["of_rows"] == 100
    for name, test in figures["tests"].items():
        assert test["strengths"] == [0.0, *STRENGTHS[name]]
        teacher = test["models"]["teacher"]
        assert teacher["accuracy"][0]["value"] == 1.0
        assert len(teacher["accuracy"]) == len(test["strengths"])
        values = [each["value"] for each in teacher["accuracy"]]
        assert values[-1] < 1.0
        assert teacher["kept"]["value"] == pytest.approx(np.mean(values[1:]))
        assert test["difference"]["value"] == pytest.approx(test["models"]["student"]["kept"]["value"] - teacher["kept"]["value"])
        assert test["difference"]["value"] != 0
    assert all(test["models"]["student"]["accuracy"][0]["value"] < 0.5 for test in figures["tests"].values())


def test_the_margin_is_that_of_the_features_before_the_head():
    model = models.causal_lm()
    model.base_model.norm.weight.data.fill_(3.0)  # else the features' root mean square is 1
    batches = told(model, rows(count=6))
    found = margin(Probe(model, CausalLM(), batches, models.VOCAB, CPU), (0.05, 0.2))
    x = torch.cat(
        [model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"])[0][batch["labels"] != -100] for batch in batches]
    )
    weight, labels = model.lm_head.weight.detach().double().numpy(), labels_and_rows(batches)[0]
    x = x.detach().double().numpy()
    for epsilon, right in zip((0.05, 0.2), found.at[1:], strict=True):
        size = epsilon * np.sqrt((x**2).mean())
        wanted = [
            all((weight[y] - weight[j]) @ row > size * np.abs(weight[y] - weight[j]).sum() for j in range(models.VOCAB) if j != y)
            for row, y in zip(x, labels, strict=True)
        ]
        assert right.tolist() == wanted
        assert 0 < sum(wanted) < len(wanted)
    assert found.note == ""


def test_a_margin_over_some_classes_says_so(monkeypatch: pytest.MonkeyPatch):
    model = models.causal_lm(vocab_size=80)
    monkeypatch.setattr(robustness, "radii", lambda *args: radii(*args, budget=0))
    found = margin(Probe(model, CausalLM(), rows(), 80, CPU), (0.05,))
    assert found.note == "an upper bound: of the other classes the 50 likeliest were looked at"


def test_a_head_that_decides_otherwise_has_no_margin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(robustness, "linear_head", lambda *args: _turned(linear_head(*args)))
    model = models.causal_lm()
    with pytest.raises(NotMeasured, match="does not decide as the model does"):
        margin(Probe(model, CausalLM(), told(model, rows()), models.VOCAB, CPU), (0.05,))


def _turned(head: LinearHead) -> LinearHead:
    return LinearHead(head.features, -head.weight, head.bias)


def test_a_classifier_is_put_to_every_test():
    teacher, student = models.classifier(seed=0), models.classifier("distilbert", seed=1)
    task = SequenceClassification()
    figures = measure(evidence({"teacher": teacher, "student": student}, told(teacher, texts(count=12)), task))
    assert figures["unit"] == "sample"
    assert all("missing" not in one for test in figures["tests"].values() for one in test["models"].values())
    assert figures["positions"] == {"attacked": 12, "disturbed": 12}


def test_without_a_teacher_the_student_stands_alone():
    figures = measure(evidence({"student": models.causal_lm()}, rows(), absent={"teacher": "it is a store"}))
    assert figures["absent"] == {"teacher": "it is a store"}
    assert set(figures["tests"]["noise"]["models"]) == {"student"}
    assert figures["tests"]["noise"]["difference"] == {"missing": "there is only one to look at"}
    with pytest.raises(NotMeasured, match=r"teacher: it is a store\. student: it is no module of torch"):
        measure(evidence({"student": None}, rows(), absent={"teacher": "it is a store"}))


def test_what_one_model_cannot_do_is_missing_of_it_alone():
    pytest.importorskip("torchao")
    teacher = models.causal_lm(seed=0)
    quantise(teacher)
    figures = measure(evidence({"teacher": teacher, "student": models.causal_lm()}, rows(count=12)))
    for name in ("fgsm", "pgd"):
        assert "quantised" in figures["tests"][name]["models"]["teacher"]["missing"]
        assert "missing" not in figures["tests"][name]["models"]["student"]
    assert "missing" not in figures["tests"]["noise"]["models"]["teacher"]


def test_one_row_has_no_interval_but_is_no_failure():
    figures = json.loads(json.dumps(measure(evidence({"student": models.causal_lm()}, rows(count=2)[:1])), allow_nan=False))
    assert figures["rows"]["attacked"] == 2
    single = [{name: value[:1] for name, value in rows()[0].items()}]
    figures = measure(evidence({"student": models.causal_lm()}, single))
    assert "one" in figures["tests"]["noise"]["models"]["student"]["accuracy"][0]["missing"]


def test_large_models_are_attacked_on_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(robustness, "WORK", 1)
    batches = rows(count=60)
    figures = measure(evidence({"student": models.causal_lm()}, batches))
    assert figures["rows"] == {"attacked": robustness.FEWEST, "disturbed": 2 * robustness.FEWEST}


def test_weights_that_a_token_passes_are_counted():
    tied, not_tied = (models.causal_lm(tie_word_embeddings=tie) for tie in (True, False))
    table = models.VOCAB * 16
    trunk = sum(p.numel() for p in tied.parameters()) - table
    assert robustness._passed(tied) == trunk + table
    assert robustness._passed(not_tied) == trunk + table
    bert = models.classifier()
    assert robustness._passed(bert) == sum(p.numel() for p in bert.parameters()) - table
