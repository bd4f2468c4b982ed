import tracemalloc
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, spearmanr  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses.measure import measure
from distill.metrics.temperature import TEMPERATURES
from distill.report import columns
from distill.report import observe as module
from distill.report.evidence import Observed, Subject
from distill.report.observe import observe, spread
from distill.tasks import CausalLM, SequenceClassification
from distill.types import IGNORE_INDEX, Batch, DataError, MixedTarget, Outputs, Target
from tests import models

CPU = torch.device("cpu")
V = 13


class Head(nn.Module):
    """A linear head of a given weight, `[V', D]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.T


def model(seed: int, width: int = V, loud: float = 1.0) -> Subject:
    """Logits of order `loud` from the ids of a batch; `width` − V columns pad, and would win every prediction."""
    rng = torch.Generator().manual_seed(seed)
    table, weight = torch.randn(50, 6, generator=rng), torch.randn(width, 6, generator=rng) * loud
    table[:, 0], weight[V:, 0] = 1.0, 50.0
    return Subject(lambda batch: Outputs(table[batch["input_ids"]], Head(weight)))


def batches(seed: int = 0, sizes: tuple[int, ...] = (4, 4, 3), length: int = 9, num_classes: int = V) -> list[Batch]:
    """Rows of ids and labels, of which two in five are −100, and one row has none."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        labels = torch.randint(num_classes, (size, length), generator=rng)
        labels[torch.rand(size, length, generator=rng) < 0.4] = IGNORE_INDEX
        found.append({"input_ids": torch.randint(50, (size, length), generator=rng), "labels": labels})
    found[0]["labels"][1] = IGNORE_INDEX
    return found


def true_logp(subject: Subject, given: list[Batch], num_classes: int = V) -> np.ndarray:
    """Log-probabilities of all valid positions, from the logits in float64."""
    rows = []
    for batch in given:
        said = subject.target(batch)
        assert isinstance(said, Outputs)
        logits = said.head(said.features)[batch["labels"] != IGNORE_INDEX][:, :num_classes]
        rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows).detach().numpy()


def true_labels(given: list[Batch]) -> np.ndarray:
    return torch.cat([batch["labels"][batch["labels"] != IGNORE_INDEX] for batch in given]).numpy()


def look(subjects: dict[str, Subject], given: list[Batch], num_classes: int = V, seed: int = 0) -> Observed:
    return observe(subjects, given, num_classes, CPU, 20, seed)


def assert_is_measure(found: Observed, subjects: dict[str, Subject], given: list[Batch]) -> None:
    """The means are those of the measure that training and `distill eval` give."""
    for name in [name for name in subjects if name != "teacher"]:
        sums: dict[str, float] = {}
        for batch in given:
            student, teacher = subjects[name].target(batch), subjects["teacher"].target(batch)
            assert isinstance(student, Outputs)
            for key, value in measure(student, teacher, batch["labels"], found.num_classes).items():
                sums[key] = sums.get(key, 0.0) + float(value)
        columns, teacher_columns = found.models[name], found.teacher
        assert columns.against is not None
        ours = {
            "count": len(found.labels),
            "loss": columns.nll.sum(),
            "accuracy": columns.correct(found.labels).sum(),
            "teacher_loss": teacher_columns.nll.sum(),
            "teacher_accuracy": teacher_columns.correct(found.labels).sum(),
            "kl": columns.against.kl.sum(),
            "agreement": (columns.top == teacher_columns.top).sum(),
        }
        assert ours == pytest.approx(sums, rel=1e-6, abs=1e-6)
        assert {k: ours[k] for k in ("count", "accuracy", "teacher_accuracy", "agreement")} == {
            k: sums[k] for k in ("count", "accuracy", "teacher_accuracy", "agreement")
        }


@pytest.mark.parametrize(("chunk", "block"), [(512, 2**16), (7, 3), (1, 1)])
def test_against_numpy_and_scipy(chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_size", lambda *_: chunk)
    monkeypatch.setattr(module, "block_size", lambda *_: block)
    subjects, given = {"a": model(1, V + 3), "teacher": model(0, V + 5), "b": model(2, loud=3.0)}, batches()
    found, y = look(subjects, given), true_labels(given)
    assert list(found.models) == ["a", "teacher", "b"]
    np.testing.assert_array_equal(found.labels, y)
    teacher = true_logp(subjects["teacher"], given)
    n = np.arange(len(y))
    for name, subject in subjects.items():
        logp, columns = true_logp(subject, given), found.models[name]
        q, p = np.exp(logp), np.exp(teacher)
        close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
        close(columns.nll, -logp[n, y])
        np.testing.assert_array_equal(columns.top, logp.argmax(-1))
        close(columns.confidence, q.max(-1))
        close(columns.entropy, entropy(q, axis=-1))
        close(columns.brier, ((q - np.eye(V)[y]) ** 2).sum(-1))
        if name == "teacher":
            assert columns.against is None
            continue
        assert columns.against is not None
        close(columns.against.kl, entropy(p, q, axis=-1))
        close(columns.against.reverse_kl, entropy(q, p, axis=-1))
        close(columns.against.acceptance, np.minimum(p, q).sum(-1))
        best = [set(np.argsort(each, -1)[i, -3:]) for each in (logp, teacher) for i in n]
        shared = [len(a & b) / 3 for a, b in zip(best[: len(n)], best[len(n) :], strict=True)]
        assert found.top_k == 3
        close(columns.against.overlap, shared)
        rank = [spearmanr(np.delete(logp[i], y[i]), np.delete(teacher[i], y[i])).statistic for i in n]
        close(columns.against.rank, rank)


def test_what_is_kept_of_the_sample() -> None:
    subjects, given = {"teacher": model(0, V + 5), "a": model(1)}, batches()
    found, y = look(subjects, given), true_labels(given)
    assert (found.sample == np.arange(len(y))).all()  # few enough
    for name, subject in subjects.items():
        logp, columns = true_logp(subject, given), found.models[name]
        assert columns.logits is not None
        assert columns.logits.dtype == np.float32
        np.testing.assert_allclose(torch.from_numpy(columns.logits).double().log_softmax(-1).numpy(), logp, rtol=1e-5, atol=1e-6)
        assert columns.scaled.shape == (len(y), 2, len(TEMPERATURES))
        for k in (0, len(TEMPERATURES) - 1):
            softened = torch.from_numpy(logp / TEMPERATURES[k]).log_softmax(-1).numpy()
            np.testing.assert_allclose(columns.scaled[:, 0, k], -softened[np.arange(len(y)), y], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(columns.scaled[:, 1, k], np.exp(softened.max(-1)), rtol=1e-4)


def test_a_smaller_sample_is_spread_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 10)
    subjects, given = {"teacher": model(0), "a": model(1)}, batches()
    found, again, other = look(subjects, given), look(subjects, given), look(subjects, given, seed=1)
    assert len(found.sample) == 10
    np.testing.assert_array_equal(found.sample, again.sample)
    assert (found.sample != other.sample).any()
    whole = true_logp(subjects["a"], given)[found.sample]
    columns = found.models["a"]
    assert columns.logits is not None
    assert columns.against is not None
    np.testing.assert_allclose(torch.from_numpy(columns.logits).double().log_softmax(-1).numpy(), whole, rtol=1e-5, atol=1e-6)
    assert set(np.flatnonzero(~np.isnan(columns.against.rank))) == set(found.sample)
    assert columns.scaled.shape[0] == 10


def test_spread_takes_one_of_each_stretch() -> None:
    drawn = np.stack([spread(100, 10, seed) for seed in range(300)])
    assert (drawn // 10 == np.arange(10)).all()
    assert len(np.unique(drawn)) == 100  # every position has its chance
    np.testing.assert_array_equal(spread(3, 10, 0), [0, 1, 2])
    uneven = spread(1003, 100, 0)
    assert len(np.unique(uneven)) == 100
    assert 0 <= uneven.min() <= uneven.max() < 1003


def test_a_large_vocabulary_has_a_smaller_sample_and_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.sample_size(3) == 4096
    assert module.sample_size(2048) == 2048
    assert module.sample_size(8192) == 512
    assert module.sample_size(128_000) == 512
    monkeypatch.setattr(columns, "LOGITS_UP_TO", V - 1)
    assert look({"a": model(1)}, batches()).models["a"].logits is None


def test_rows_are_counted_over_batches() -> None:
    given = batches()
    found = look({"teacher": model(0)}, given)
    labels = torch.cat([batch["labels"] for batch in given]).numpy()
    np.testing.assert_array_equal(found.rows, [i for i, row in enumerate(labels) for y in row if y != IGNORE_INDEX])
    assert 1 not in found.rows  # it has no label
    assert found.of_rows == 20


@pytest.mark.parametrize(("num_classes", "k"), [(2, 1), (3, 1), (7, 1), (8, 2), (19, 4), (20, 5), (1000, 5)])
def test_top_k_is_at_most_a_quarter_of_the_classes(num_classes: int, k: int) -> None:
    subject = Subject(lambda batch: Outputs(torch.randn(*batch["labels"].shape, num_classes), nn.Identity()))
    assert look({"teacher": subject}, batches(num_classes=2), num_classes).top_k == k


def test_means_are_those_of_measure() -> None:
    subjects, given = {"teacher": model(0, V + 5), "a": model(1, V + 2), "b": model(2, loud=4.0)}, batches()
    assert_is_measure(look(subjects, given), subjects, given)


@pytest.mark.parametrize("how", ["probabilities", "log_probabilities"])
def test_an_ensemble_teacher(how: Any) -> None:
    def mixed(batch: Batch) -> Target:
        parts = tuple(model(seed, V + seed).target(batch) for seed in (3, 4))
        weights = torch.tensor([0.3, 0.7]).expand(*batch["labels"].shape, 2)
        return MixedTarget(parts, weights, how)  # type: ignore[arg-type]  # they are Outputs

    subjects, given = {"teacher": Subject(mixed), "a": model(1)}, batches()
    assert_is_measure(look(subjects, given), subjects, given)


def test_routed_teachers_each_teach_their_rows() -> None:
    def routed(batch: Batch) -> Target:
        parts = tuple(model(seed).target(batch) for seed in (3, 4))
        first = (torch.arange(len(batch["labels"])) % 2 == 0)[:, None].expand(batch["labels"].shape)
        return MixedTarget(parts, torch.stack([first, ~first], -1).float(), "apart")  # type: ignore[arg-type]

    subjects, given = {"teacher": Subject(routed), "a": model(1)}, batches()
    assert_is_measure(look(subjects, given), subjects, given)


def test_teachers_apart_are_seen_as_their_mean() -> None:
    def target(how: Any, batch: Batch) -> Target:
        parts = tuple(model(seed).target(batch) for seed in (3, 4))
        return MixedTarget(parts, torch.full((*batch["labels"].shape, 2), 0.5), how)  # type: ignore[arg-type]

    given = batches()
    apart, mean = (look({"teacher": Subject(partial(target, how)), "a": model(1)}, given) for how in ("apart", "probabilities"))
    np.testing.assert_array_equal(apart.teacher.nll, mean.teacher.nll)


def test_a_classifier_on_padded_rows() -> None:
    rng = torch.Generator().manual_seed(0)
    given: list[Batch] = []
    for size in (5, 3):
        lengths = torch.randint(2, 9, (size, 1), generator=rng)
        mask = (torch.arange(8) < lengths).long()
        ids = torch.randint(3, models.VOCAB, (size, 8), generator=rng) * mask
        given.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, (size, 1), generator=rng)})
    made = {"teacher": models.classifier(seed=1, num_hidden_layers=3), "student": models.classifier(seed=2)}
    subjects = {name: Subject(partial(SequenceClassification().outputs, each), each) for name, each in made.items()}
    found = look(subjects, given, 3)
    assert_is_measure(found, subjects, given)
    np.testing.assert_array_equal(found.rows, np.arange(8))
    assert found.models["student"].logits is not None
    alone = made["student"](input_ids=given[1]["input_ids"][2:], attention_mask=given[1]["attention_mask"][2:]).logits
    np.testing.assert_allclose(found.models["student"].logits[7], alone[0].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_packed_rows() -> None:
    ids, positions = models.tokens(2, 8), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    labels = ids.roll(-1, 1)
    labels[:, [3, 7]] = IGNORE_INDEX
    made = {"teacher": models.causal_lm(seed=1, num_hidden_layers=3), "student": models.causal_lm(seed=2)}
    subjects = {name: Subject(partial(CausalLM().outputs, each), each) for name, each in made.items()}
    given: list[Batch] = [{"input_ids": ids, "position_ids": positions, "labels": labels}]
    found = look(subjects, given, models.VOCAB)
    assert_is_measure(found, subjects, given)
    np.testing.assert_array_equal(found.rows, [0] * 6 + [1] * 6)
    alone = made["student"](ids[:1, 4:]).logits[0, :3].log_softmax(-1)  # the second document by itself
    np.testing.assert_allclose(found.models["student"].nll[3:6], -alone[range(3), labels[0, 4:7]].detach().numpy(), rtol=1e-4)


def test_without_a_teacher_nothing_stands_beside_one() -> None:
    found = look({"a": model(1)}, batches())
    assert found.models["a"].against is None


def test_a_model_in_training_mode_does_not_drop_out_and_is_left_as_it_was() -> None:
    dropout = nn.Dropout(0.5)
    dropout.train()
    subject = Subject(lambda batch: Outputs(dropout(torch.ones(*batch["labels"].shape, V)), nn.Identity()), dropout)
    found = look({"a": subject}, batches())
    np.testing.assert_allclose(found.models["a"].nll, np.log(V), rtol=1e-6)
    assert dropout.training


def test_nothing_to_look_at_says_so() -> None:
    given = batches()
    for batch in given:
        batch["labels"].fill_(IGNORE_INDEX)
    with pytest.raises(DataError, match="none of the 20 held-out rows has a label"):
        look({"a": model(1)}, given)


def test_batches_may_come_one_by_one_and_keep_their_order() -> None:
    given = batches()
    whole = look({"teacher": model(0), "a": model(1)}, given)
    drawn = observe({"teacher": model(0), "a": model(1)}, iter(given), V, CPU, 20)
    np.testing.assert_array_equal(whole.models["a"].nll, drawn.models["a"].nll)
    torch.manual_seed(3)
    asked: list[Tensor] = []
    plain = model(0).target

    def noting(batch: Batch) -> Target:
        asked.append(batch["input_ids"])
        return plain(batch)

    look({"teacher": Subject(noting)}, given)
    assert len(asked) == len(given)  # once each
    assert all((seen == batch["input_ids"]).all() for seen, batch in zip(asked, given, strict=True))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made here hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.seen = 0, 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and (storage := each.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, count: int) -> None:
        self.now -= count


def test_memory_does_not_grow_with_positions_times_classes() -> None:
    classes, rows = 2000, 8
    table = torch.randn(50, classes)
    subject = Subject(lambda batch: Outputs(batch["input_ids"][..., None].float(), Lookup(table)))

    def peak(count: int) -> int:
        given = batches(sizes=(rows,) * count, length=16, num_classes=classes)
        tracemalloc.start()
        with Peak() as mode:
            found = look({"teacher": subject, "a": subject}, given, classes)
        _, of_numpy = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(found.labels) > 50 * count
        return mode.most + of_numpy

    few, many = peak(4), peak(12)
    positions = 8 * rows * 16 * 0.6
    assert many - few < positions * classes  # a quarter of what the logits of one model would take


class Lookup(nn.Module):
    """Logits by id, so that features need no room."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, features: Tensor) -> Tensor:
        return self.table[features[..., 0].long()]
