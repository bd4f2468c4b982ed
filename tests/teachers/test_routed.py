"""A teacher for each kind of row: every position's target is that of its own teacher, which runs on no other rows."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn

from distill.data.text import PromptData
from distill.losses.chunked import chunked_objective
from distill.losses.divergence import ForwardKL, ReverseKL
from distill.losses.jensen_shannon import JensenShannon
from distill.losses.measure import measure
from distill.tasks import CausalLM, Task
from distill.teachers.base import Teacher
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from distill.teachers.routed import Routed
from distill.types import Batch, ConfigError, Outputs, SparseTarget, Support
from tests import pair
from tests.models import VOCAB, causal_lm, save, tokenizer, tokens

V = 5
TABLES = {name: 2 * torch.randn(10, V, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, name in enumerate("xyz")}


class Table(Teacher):
    """Looks its logits up by the token; writes down whom it was asked about."""

    def __init__(self, name: str, k: int | None = None, T: float | None = None) -> None:
        self.name, self.k, self.T = name, k, T
        self.rows: list[list[int]] = []
        self.told: list[list[int]] = []

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None: ...

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None: ...

    def ahead(self, batch: Batch) -> None:
        self.told.append(batch["sample_ids"].tolist())

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs | SparseTarget:
        self.rows.append(batch["sample_ids"].tolist())
        z = TABLES[self.name][batch["input_ids"]]
        if self.k is None:
            return Outputs(z, nn.Identity())
        probs, ids = z.softmax(-1).topk(self.k)
        return SparseTarget(ids, probs.float(), 1 - probs.sum(-1).float(), 1.0)

    @property
    def support(self) -> Support:
        return "classes" if self.k is None else "bins"

    @property
    def temperature(self) -> float | None:
        return self.T

    def describe(self) -> dict[str, Any]:
        return {}


def batch(route: list[list[int]], labels: list[list[int]]) -> dict[str, Tensor]:
    count, length = len(labels), len(labels[0])
    ids = torch.arange(count * length).view(count, length) % 10
    return {"input_ids": ids, "labels": torch.tensor(labels), "route": torch.tensor(route), "sample_ids": torch.arange(count) + 100}


# packed: row 0 holds documents of x, then y; row 1 of y, and padding; row 2 of x, whose last label is none; row 3 of z, of no label
PACKED = batch(
    [[0, 0, 0, 1], [1, 1, -1, -1], [0, 0, 0, 0], [2, 2, 2, 2]],
    [[1, 2, -100, 3], [4, 0, -100, -100], [1, 1, 1, -100], [-100, -100, -100, -100]],
)
NAMED = [[0, 0, None, 1], [1, 1, None, None], [0, 0, 0, None], [None] * 4]


def routed(**more: Any) -> tuple[Routed, dict[str, Table]]:
    tables = {name: Table(name, **more) for name in "xyz"}
    teacher = Routed(dict(tables))
    teacher.check_routes(["x", "y", "z"])
    return teacher, tables


def by_hand(student: Tensor, of_one: Any) -> Tensor:
    """The sum over the positions, each with its teacher's distribution."""
    total = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(NAMED):
        for t, number in enumerate(row):
            if number is not None:
                p = TABLES["xyz"[number]][PACKED["input_ids"][b, t]].softmax(-1)
                total = total + of_one(p, student[b, t].softmax(-1))
    return total


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def evaluated(teacher: Teacher, loss: Any, student: Tensor, given: Batch = PACKED) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    total = chunked_objective(Outputs(leaf, nn.Identity()), teacher(given), given["labels"], {"kd": loss}, {"kd": 1.0}, V, chunk=3)[0]
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


STUDENT = torch.randn(4, 4, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(("loss", "of_one"), [(ForwardKL(), kl), (ReverseKL(), lambda p, q: kl(q, p))])
def test_every_position_has_its_own_teacher(loss: Any, of_one: Any) -> None:
    teacher, tables = routed()
    value, gradient = evaluated(teacher, loss, STUDENT)
    leaf = STUDENT.clone().requires_grad_()
    true = by_hand(leaf, of_one)
    true.backward()
    assert value == pytest.approx(true.item(), rel=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-6, atol=1e-8)
    assert {name: table.rows for name, table in tables.items()} == {"x": [[100, 102]], "y": [[100, 101]], "z": []}


def test_they_are_told_of_their_rows_ahead() -> None:
    teacher, tables = routed()
    teacher.ahead(PACKED)
    assert {name: table.told for name, table in tables.items()} == {"x": [[100, 102]], "y": [[100, 101]], "z": []}


@pytest.mark.parametrize("loss", [ForwardKL(), JensenShannon()])
def test_sparse_targets_are_each_on_their_own_bins(loss: Any) -> None:
    """Some know all classes, others two and a tail: the term of each position is that of its teacher alone."""
    parts: dict[str, Teacher] = {"x": Table("x"), "y": Table("y", k=2, T=1.0), "z": Table("z")}
    teacher = Routed(parts)
    teacher.check_routes(["x", "y", "z"])
    assert (teacher.support, teacher.temperature, teacher(PACKED).how) == ("bins", 1.0, "apart")
    value, gradient = evaluated(teacher, loss, STUDENT)
    expected, slope = 0.0, torch.zeros_like(STUDENT)
    for number, name in enumerate("xyz"):
        alone = {**PACKED, "labels": PACKED["labels"].masked_fill(PACKED["route"] != number, -100)}
        one, own = evaluated(parts[name], loss, STUDENT, alone)
        expected, slope = expected + one, slope + own
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-8)


def test_it_measures_a_student() -> None:
    target = routed()[0](PACKED)
    assert target.how == "probabilities"  # one distribution, not one term for each teacher
    found = measure(Outputs(STUDENT, nn.Identity()), target, PACKED["labels"], V)
    assert found["kl"].item() == pytest.approx(by_hand(STUDENT, kl).item(), rel=1e-6)


def test_a_batch_without_labels_asks_nobody() -> None:
    teacher, tables = routed()
    blank = {**PACKED, "labels": torch.full_like(PACKED["labels"], -100)}
    found = measure(Outputs(STUDENT, nn.Identity()), teacher(blank), blank["labels"], V)
    assert found["count"].item() == 0
    with torch.device("meta"):  # what names no device would be there, and not with the batch
        assert teacher(blank).weights.device == blank["labels"].device
    assert not any(table.rows for table in tables.values())


def test_one_label_a_row() -> None:
    teacher, tables = routed()
    rows = batch([[1], [0], [1]], [[3], [2], [0]])
    target = teacher(rows)
    assert target.weights.tolist() == [[[0, 1]], [[1, 0]], [[0, 1]]]
    assert [part.features[:, 0].any(-1).tolist() for part in target.parts if isinstance(part, Outputs)] == [
        [False, True, False],
        [True, False, True],
    ]
    assert (tables["x"].rows, tables["y"].rows) == ([[101]], [[100, 102]])


def test_what_cannot_work() -> None:
    two: dict[str, Teacher] = {"x": Table("x"), "y": Table("y")}
    with pytest.raises(ConfigError, match=r"data name no teachers; set data.route_column to the column that says which of x, y"):
        Routed(two).check_routes([])
    with pytest.raises(ConfigError, match=r"names 'w', 'v', but model.teacher.teachers has only x, y"):
        Routed(two).check_routes(["w", "x", "v"])
    with pytest.raises(ConfigError, match="x is itself made of several"):
        Routed({"x": Ensemble([Table("y")])})
    with pytest.raises(ConfigError, match=r"teachers\.x is sharded"):
        Routed({"x": OnlineTeacher("m", sharded=True)})
    with pytest.raises(ConfigError, match=r"a term compares activations \(layer\.0\), but the rows have different teachers \(x, y, z\)"):
        routed()[0](PACKED, ["layer.0"])
    with pytest.raises(ConfigError, match="different temperatures"):
        Routed({"x": Table("x", k=1, T=1.0), "y": Table("y", k=1, T=2.0)}).check(None, {})


def test_a_teacher_that_no_row_names_is_said() -> None:
    with pytest.warns(UserWarning, match=r"teachers\.y teaches no row: the data name x"):
        Routed({"x": Table("x"), "y": Table("y")}).check_routes(["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Routed({"x": Table("x"), "y": Table("y")}).check_routes(["x", "y"])


def test_real_models_on_some_rows(tmp_path: Path) -> None:
    teacher = Routed({str(seed): OnlineTeacher(save(causal_lm(seed=seed), tmp_path / str(seed))) for seed in (0, 1)})
    teacher.setup(CausalLM(), torch.device("cpu"), torch.float32)
    teacher.check(tokenizer(), {"vocab_size": VOCAB})
    teacher.check_routes(["0", "1"])
    given = {"input_ids": tokens(3, 6), "labels": tokens(3, 6), "route": torch.tensor([[1] * 6, [0] * 6, [1] * 6])}
    target = teacher(given)
    for seed, part in enumerate(target.parts):
        assert isinstance(part, Outputs)
        mine = given["route"][:, 0] == seed
        torch.testing.assert_close(part.head(part.features)[mine], causal_lm(seed=seed)(given["input_ids"]).logits[mine])
        assert not part.features[~mine].any()


def test_a_student_trains_on_it(tmp_path: Path) -> None:
    """Both names stand for the same model: the gradients are those of one teacher, and the validation rows are measured."""
    plain = pair.data(tmp_path, batch_size=4)
    rows = [json.loads(line) for line in Path(plain.train_data).read_text().splitlines()]
    path = tmp_path / "kinds.jsonl"
    path.write_text("\n".join(json.dumps({**row, "kind": "ab"[i % 2]}) for i, row in enumerate(rows)))
    folder = str(tmp_path / "teacher")
    runs = []
    for teacher in (Routed({"b": OnlineTeacher(folder), "a": OnlineTeacher(folder)}), OnlineTeacher(folder)):
        data = PromptData(
            train_data=str(path), tokenizer=folder, pack=False, max_length=32, val_fraction=0.1, batch_size=4, route_column="kind"
        )
        data.setup()
        if isinstance(teacher, Routed):
            teacher.check_routes(data.routes)
        gradients = pair.Gradients()
        trainer = pair.trainer(max_steps=2, callbacks=[gradients], limit_val_batches=1, val_check_interval=2)
        trainer.fit(pair.module(tmp_path, teacher=teacher), data)
        runs.append((gradients.steps, trainer.callback_metrics["val/kl"]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-6)


def test_a_sharded_student_does_not_teach_some_rows_alone() -> None:
    with pytest.raises(ConfigError, match=r"the student itself, whose weights this trainer\.strategy cuts into shards"):
        Routed({"x": OnlineTeacher("m"), "y": SelfTeacher()}).spread(ModelParallelStrategy())
