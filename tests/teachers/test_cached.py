"""A teacher that is a store on disk gives what the teacher behind it would, and says what is wrong where it cannot."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill import objective
from distill.data.classification import ClassificationData
from distill.losses.divergence import ForwardKL, ReverseKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.report.sources import caching
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.online import OnlineTeacher
from distill.teachers.padded import places
from distill.teachers.store import finished
from distill.teachers.store.shard import shard_path
from distill.types import ConfigError, DataError, SparseTarget
from tests import models, pair
from tests.data.helpers import WORDS
from tests.parallel.runs import Record
from tests.stores import cached, job, written

EXACT = {"k": len(WORDS), "draws": 0, "bits": 32, "temperature": 2.0}
BATCH = 4


def opened(teacher: Teacher, data: Any) -> Any:
    """A teacher, ready as `Pair.setup` makes it."""
    data.setup()
    teacher.setup(data.task(), torch.device("cpu"), torch.float32)
    teacher.check(data.tokenizer, data.model_config())
    teacher.check_rows(lambda: data.fingerprint)
    return teacher


def batches(data: Any) -> list[dict[str, Tensor]]:
    return list(data.train_dataloader())


def losses_of(tmp_path: Path, teacher: Teacher, terms: Any = None, **data: Any) -> list[float]:
    pl.seed_everything(0, verbose=False)
    record = Record()
    module = pair.module(tmp_path, teacher=teacher, losses=terms or {"ce": CrossEntropy(), "kd": ForwardKL(2.0)}, balancer=None)
    trainer = pair.trainer(max_steps=8, accumulate_grad_batches=2, callbacks=[record], log_every_n_steps=1)
    trainer.fit(module, pair.data(tmp_path, batch_size=BATCH, **data))
    return record.losses


def value_and_gradients(tmp_path: Path, target: Any, batch: Any, data: Any) -> tuple[Tensor, list[Tensor]]:
    module = pair.module(tmp_path, losses={"kd": ForwardKL(2.0)}, balancer=None)
    student = module.recipe_of_student.build(data.task(), data.model_config(), data.tokenizer, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    outputs = data.task().outputs(student, batch)
    value = objective.evaluate(module.terms, {"kd": 1.0}, outputs, target, batch, data.num_classes).total
    value.backward()
    return value.detach(), [parameter.grad for parameter in student.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("packed", [False, True])
def test_all_classes_in_full_precision_are_the_teacher_in_memory(tmp_path: Path, packed: bool) -> None:
    data = pair.data(tmp_path, batch_size=BATCH)
    data.pack = packed
    here = opened(written(tmp_path, data, **EXACT), data)
    online = opened(OnlineTeacher(str(tmp_path / "teacher")), data)
    for batch in batches(data)[:4]:
        assert ("position_ids" in batch) == packed
        (ours, of_ours), (theirs, of_theirs) = (value_and_gradients(tmp_path, each(batch), batch, data) for each in (here, online))
        assert ours > 1e-3, "there is something to compare"
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        for gradient, expected in zip(of_ours, of_theirs, strict=True):
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (here.support, here.temperature, here.models()) == ("bins", 2.0, [])


def test_a_whole_training_has_the_losses_of_a_teacher_in_memory(tmp_path: Path) -> None:
    teacher = written(tmp_path, **EXACT)
    told: list[bool] = []
    taken = CachedTeacher._taken

    def count(self: CachedTeacher, where: Any) -> Any:
        told.append(any(keys == where.keys for keys, _ in self._coming))
        return taken(self, where)

    CachedTeacher._taken = count  # type: ignore[method-assign]
    try:
        ours = losses_of(tmp_path, teacher)
    finally:
        CachedTeacher._taken = taken  # type: ignore[method-assign]
    assert ours == pytest.approx(losses_of(tmp_path, OnlineTeacher(str(tmp_path / "teacher"))), abs=1e-5)
    assert len(set(ours)) == 8
    assert told == [True] * 16, "every batch was decoded ahead"


def test_hidden_states_come_back_in_8_bits(tmp_path: Path) -> None:
    terms = {"ce": CrossEntropy(), "hidden": HiddenMSE(layers="uniform")}
    data = pair.data(tmp_path, batch_size=BATCH)
    here = opened(written(tmp_path, data, losses=terms), data)
    online = opened(OnlineTeacher(str(tmp_path / "teacher")), data)
    names = ["model.layers.0:input", "model.layers.1"]
    for batch in batches(data)[:3]:
        ours, theirs = (each(batch, names).taps for each in (here, online))
        assert sorted(ours) == names
        real = batch["attention_mask"].bool()
        for name in names:
            rounding = theirs[name].abs().amax(-1, keepdim=True) / 127
            assert ((ours[name] - theirs[name]).abs() <= 0.51 * rounding)[real].all()
            assert (ours[name] != theirs[name])[real].any(), "8 bits are coarser"
    ours, theirs = (losses_of(tmp_path, teacher, terms) for teacher in (here, online))
    assert ours == pytest.approx(theirs, rel=1e-2)
    with pytest.raises(ConfigError, match=r"does not hold: model\.norm \(it has model\.layers\.0:input, model\.layers\.1\)"):
        here(batches(data)[0], ["model.norm"])


def test_draws_are_unbiased_and_their_gradient_is_too(tmp_path: Path) -> None:
    """The mean over independent stores: each entry within 5 standard errors of the dense one, all together about 1."""
    data = pair.data(tmp_path, rows=8, batch_size=BATCH)
    online = opened(OnlineTeacher(str(tmp_path / "teacher")), data)
    batch = batches(data)[0]
    valid = batch["labels"] != -100
    dense = (lambda out: out.head(out.features))(online(batch))[valid][:, : data.num_classes].div(2.0).softmax(-1).double()
    seeds, draws, total = 40, 16, torch.zeros_like(dense)
    gradients = []
    for seed in range(seeds):
        here = opened(written(tmp_path, data, store=f"store-{seed}", draws=draws, temperature=2.0, seed=seed), data)
        target = here(batch)
        assert here.support == "draws"
        assert (target.tail[valid] == 0).all()
        found = torch.zeros_like(dense)
        ids, probs = target.ids[valid], target.probs[valid].double()
        total += found.scatter_add_(-1, ids.clamp(min=0), probs)
        gradients.append(value_and_gradients(tmp_path, target, batch, data)[1][-1])
    error = (dense * (1 - dense) / (seeds * draws)).sqrt()
    z = (total / seeds - dense) / error
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean().sqrt() < 1.2, "neither biased nor the same draws again"
    expected, many = value_and_gradients(tmp_path, online(batch), batch, data)[1][-1], torch.stack(gradients)
    spread = many.std(0) / seeds**0.5
    assert ((many.mean(0) - expected).abs() <= 5 * spread + 1e-6).all()


def test_rows_are_found_whatever_batch_they_are_in(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=BATCH)
    here = opened(written(tmp_path, data), data)
    rows = [data.train_set[i] for i in (5, 3, 40)]
    together = here(data.collator()(rows))
    for i, row in enumerate(rows):
        alone, at = here(data.collator()([row])), torch.from_numpy(np.flatnonzero(row["labels"] != -100))
        assert len(at)
        for position in at.tolist():
            classes = [
                dict(zip(t.ids[b, position].tolist(), t.probs[b, position].tolist(), strict=True)) for t, b in ((together, i), (alone, 0))
            ]
            for each in classes:
                each.pop(-1, None)
            assert classes[0] == classes[1]


def test_what_was_decoded_ahead_is_known_by_its_content(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=BATCH)
    here = opened(written(tmp_path, data), data)
    first, skipped, third, never = batches(data)[:4]
    for batch in (first, skipped, third):
        here.ahead(batch)
    expected = {id(batch): here._decoded(places(batch)) for batch in (first, third, never)}
    for batch in (first, third, never):  # the second is left out, as by limit_train_batches
        target = here({**batch, "num_valid": torch.tensor(1)})
        assert torch.equal(target.ids, expected[id(batch)].ids)
        assert torch.equal(target.probs, expected[id(batch)].probs)
    assert not here._coming


def test_a_position_without_a_label_is_a_target_too(tmp_path: Path) -> None:
    """All of `SparseTarget`'s promises: an id first, no fill before an id, probabilities and tail with sum 1."""
    data = pair.data(tmp_path, batch_size=BATCH)
    for kept in ({"draws": 8}, {"k": 3, "draws": 0}, {"k": 3, "draws": 8}):
        target = opened(written(tmp_path, data, store=f"store-{len(kept)}{kept.get('k')}{kept['draws']}", **kept), data)(batches(data)[0])
        assert isinstance(target, SparseTarget)
        assert (target.ids[..., 0] >= 0).all()
        assert target.ids.dtype == torch.int64
        assert ((target.ids >= 0) | (target.probs == 0)).all()
        assert (target.probs.sum(-1) + target.tail - 1).abs().max() < 1e-5


def test_one_label_a_row(tmp_path: Path) -> None:
    models.save(models.classifier(hidden_size=32, intermediate_size=48), tmp_path / "teacher")
    lines = [f"{' '.join(f'w{3 + (i * j) % 30}' for j in range(1, 2 + i % 7))}\t{models.LABELS[i % 3]}" for i in range(24)]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(lines))
    given = {"text": "text", "label": "label", "labels": list(models.LABELS), "max_length": 16, "val_fraction": 0.25, "batch_size": 4}
    data = ClassificationData(str(tmp_path / "train.tsv"), tokenizer=str(tmp_path / "teacher"), **given)
    teacher = cached(tmp_path, k=3, draws=0, bits=32)
    module = pair.module(tmp_path, teacher=teacher, losses={"kd": ForwardKL(1.0)}, balancer=None)
    caching.write(job(teacher, data, module), ["bert.encoder.layer.0"], 5)
    here, online = (opened(t, data) for t in (cached(tmp_path, k=3, draws=0, bits=32), OnlineTeacher(str(tmp_path / "teacher"))))
    for batch in batches(data):
        target, outputs = (each(batch, ["bert.encoder.layer.0"]) for each in (here, online))
        dense = torch.zeros(4, 1, 3).scatter(-1, target.ids, target.probs)
        assert torch.allclose(dense, outputs.head(outputs.features).softmax(-1), atol=1e-6)
        real = batch["attention_mask"].bool()
        gap = (target.taps["bert.encoder.layer.0"] - outputs.taps["bert.encoder.layer.0"])[real].abs().max()
        assert 0 < gap < 0.02 * outputs.taps["bert.encoder.layer.0"].abs().max()


class Absent(OnlineTeacher):
    """One whose model must not be touched."""

    def setup(self, *args: Any) -> None:
        raise AssertionError("the source was loaded")

    __call__ = check = describe = setup  # type: ignore[assignment]


def test_training_never_loads_the_teacher(tmp_path: Path) -> None:
    written(tmp_path, **EXACT)
    teacher = CachedTeacher(str(tmp_path / "store"), source=Absent(str(tmp_path / "teacher")), **EXACT)
    assert len(losses_of(tmp_path, teacher)) == 8
    assert teacher.models() == []
    online = OnlineTeacher(str(tmp_path / "teacher"))
    opened(online, pair.data(tmp_path))
    assert online.model is not None
    assert [n for n, _ in teacher.structure().named_modules()] == [n for n, _ in online.model.named_modules()]  # type: ignore[union-attr]
    assert all(p.is_meta for p in teacher.structure().parameters())  # type: ignore[union-attr]
    described = teacher.describe()
    assert online.describe().items() <= described.items()
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store").glob("shard-*.bin"))
    assert described["store_megabytes"] == pytest.approx(on_disk / 1e6)


def test_a_store_without_its_source_trains(tmp_path: Path) -> None:
    written(tmp_path, **EXACT)
    assert losses_of(tmp_path, CachedTeacher(str(tmp_path / "store"), **EXACT)) == losses_of(tmp_path, cached(tmp_path, **EXACT))


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    data = pair.data(tmp_path)
    written(tmp_path, data, k=3, draws=5)
    same: dict[str, Any] = {"k": 3, "draws": 5}
    for changed, said in (
        ({"temperature": 2.0}, r"temperature=1\.0, but 2\.0 is wanted"),
        ({"k": 4}, r"k=3, but 4 is wanted"),
        ({"draws": 6}, r"draws=5, but 6 is wanted"),
        ({"bits": 16}, r"bits=8, but 16 is wanted"),
        ({"seed": 1}, r"seed=0, but 1 is wanted"),
        ({"model": "other"}, r"teacher='.*teacher', but '.*other' is wanted"),
    ):
        with pytest.raises(ConfigError, match=said):
            opened(cached(tmp_path, **(same | changed)), data)
    other = pair.data(tmp_path, rows=65)
    with pytest.raises(ConfigError, match=r"data='[0-9a-f]+', but '[0-9a-f]+' is wanted"):
        opened(cached(tmp_path, **same), other)
    pair.data(tmp_path)  # writes the former rows again
    vocabulary = data.tokenizer.get_vocab()
    exchanged = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    data.tokenizer.get_vocab = lambda: exchanged
    with pytest.raises(ConfigError, match=r"tokenizer='[0-9a-f]+', but '[0-9a-f]+' is wanted"):
        opened(cached(tmp_path, **same), data)


def test_a_row_that_the_store_does_not_know_is_named_with_both_fingerprints(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=BATCH)
    here = opened(written(tmp_path, data), data)
    batch = batches(data)[0]
    batch["input_ids"][2, 0] += 1
    with pytest.raises(
        DataError, match=rf"does not know a row .* its rows is {data.fingerprint}, that of the training rows {data.fingerprint}"
    ):
        here(batch)


def test_terms_that_are_not_right_on_a_store_are_refused(tmp_path: Path) -> None:
    data, module = pair.data(tmp_path), pair.module(tmp_path, losses={"kd": ReverseKL(1.0)}, balancer=None)
    with pytest.raises(ConfigError, match=r"model\.losses\.kd: ReverseKL needs .* but model\.teacher gives classes drawn at random"):
        job(cached(tmp_path), data, module)
    written(tmp_path, data)
    with pytest.raises(ConfigError, match=r"model\.losses\.kd\.temperature is 2, but the teacher's target was made with 1"):
        losses_of(tmp_path, cached(tmp_path))


def test_a_store_that_is_missing_or_half_written_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "my configs/kd.yaml", "--model.teacher.k=8"])
    with pytest.raises(
        ConfigError, match=r"no store '.*store'; write it first with `python train\.py cache --config 'my configs/kd\.yaml' --mo"
    ):
        cached(tmp_path).recipe_needed()
    data = pair.data(tmp_path)
    teacher = written(tmp_path, data)
    assert teacher.recipe_needed() is None  # type: ignore[func-returns-value]
    (tmp_path / "store" / "finished.json").unlink()
    shard_path(tmp_path / "store", 1).with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match=r"is not finished, it has 3 of 4 shards; go on with `python train\.py cache --config"):
        opened(teacher, data)


def test_a_flipped_byte_stops_the_training(tmp_path: Path) -> None:
    teacher = written(tmp_path, temperature=2.0)
    path = shard_path(tmp_path / "store", 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00002\.bin' is damaged: it has other bytes than were written; .* cache"):
        losses_of(tmp_path, teacher)


def test_what_the_store_says_of_the_teacher_on_validation_rows(tmp_path: Path) -> None:
    """Against transformers, row by row in float64."""
    data = pair.data(tmp_path)
    here = opened(written(tmp_path, data), data)
    model = models_of(tmp_path).requires_grad_(False)
    count = loss = right = 0.0
    for row in data.val_set:
        labels = torch.tensor(row["labels"])
        logp = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0].log_softmax(-1)
        for position in (labels != -100).nonzero()[:, 0].tolist():
            count, loss = count + 1, loss - float(logp[position, labels[position]])
            right += float(logp[position].argmax() == labels[position])
    measured = here.measured()
    assert measured == pytest.approx({"count": count, "loss": loss / count, "accuracy": right / count}, rel=1e-5)
    assert finished(tmp_path / "store") is not None


def models_of(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float64).eval()


@pytest.mark.parametrize(
    ("wrong", "said"), [({"k": 0, "draws": 0}, "nothing would be kept"), ({"k": -1}, "k=-1"), ({"temperature": 0.0}, "> 0")]
)
def test_numbers_out_of_range_are_refused(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CachedTeacher("x", **wrong)
