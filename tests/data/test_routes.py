"""Rows that name their teacher, from the file to the batch, worked out by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from distill.data import digest, routes
from distill.data.base import DistillData
from distill.data.chat import ChatData
from distill.data.classification import ClassificationData
from distill.data.text import PromptData, TextData
from distill.types import DataError
from tests.data.helpers import EOS, PAD, A, B, C, D, E, word_tokenizer

ROWS = [{"text": "a b", "kind": "prose"}, {"text": "c d e", "kind": "code"}, {"text": "a", "kind": "prose"}]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ready(data: DistillData) -> DistillData:
    data.setup()
    return data


def text(tmp_path: Path, words: str, rows: list[dict[str, Any]] = ROWS, **more: Any) -> DistillData:
    given = {"val_fraction": 0, "max_length": 4, "route_column": "kind"}
    return ready(TextData(train_data=jsonl(tmp_path / "t.jsonl", rows), tokenizer=words, **(given | more)))


def rows_of(data: DistillData) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = data.train_set.with_format(None).to_list()
    return found


def test_documents_of_different_teachers_share_a_packed_row(tmp_path: Path, words: str) -> None:
    data = text(tmp_path, words)
    assert data.routes == ["code", "prose"]
    assert rows_of(data) == [
        {"input_ids": [A, B, EOS, C], "labels": [B, EOS, -100, D], "position_ids": [0, 1, 2, 0], "route": [1, 1, 1, 0]},
        {"input_ids": [D, E, EOS, A], "labels": [E, EOS, -100, EOS], "position_ids": [0, 1, 2, 0], "route": [0, 0, 0, 1]},
        {"input_ids": [EOS, PAD, PAD, PAD], "labels": [-100] * 4, "position_ids": [0, 0, 1, 2], "route": [1, -1, -1, -1]},
    ]
    data.batch_size = 3
    (batch,) = data.train_dataloader()
    assert batch["route"].shape == batch["labels"].shape
    assert batch["route"].dtype == torch.int64
    assert data.summary()["teachers named"] == "code, prose"


def test_pieces_and_padding(tmp_path: Path, words: str) -> None:
    data = text(tmp_path, words, pack=False, max_length=3, batch_size=4)
    assert [row["route"] for row in rows_of(data)] == [[1, 1, 1], [0, 0, 0], [1, 1]]  # the piece `<eos>` predicts nothing
    (batch,) = text(tmp_path, words, pack=False, max_length=3, batch_size=3).train_dataloader()
    order = batch["sample_ids"].argsort()
    assert batch["route"][order].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, -1]]


def test_names_of_all_splits_have_one_order(tmp_path: Path, words: str) -> None:
    source, other = jsonl(tmp_path / "t.jsonl", ROWS), jsonl(tmp_path / "val.jsonl", [{"text": "a", "kind": "maths"}])
    common: dict[str, Any] = {"tokenizer": words, "max_length": 4, "val_fraction": 0, "route_column": "kind"}
    few = ready(TextData(train_data=source, **common))
    data = ready(TextData(train_data=source, val_data=other, test_data=other, **common))
    assert (few.routes, data.routes) == (["code", "prose"], ["code", "maths", "prose"])
    assert data.val_set is not None
    assert data.val_set[0]["route"].tolist() == [1, 1, -1, -1]
    assert rows_of(few)[0]["route"] == [1, 1, 1, 0]
    assert rows_of(data)[0]["route"] == [2, 2, 2, 0]  # not those of the cache, where there were two names


def test_held_out_rows_keep_theirs(tmp_path: Path, words: str) -> None:
    rows = [{"text": " ".join("abcdefghij"[: i + 1]), "kind": "xy"[i % 2]} for i in range(10)]
    data = text(tmp_path, words, rows, pack=False, max_length=12, val_fraction=0.3)
    assert data.val_set is not None
    assert len(data.val_set) == 3
    for row in [*data.train_set, *data.val_set]:
        assert set(row["route"].tolist()) == {len(row["input_ids"]) % 2}  # i + 1 words and the end: even where i is


def test_prompts_and_conversations(tmp_path: Path, words: str) -> None:
    rows = [{"prompt": "a", "completion": "b", "kind": 7}, {"prompt": "c", "completion": "d", "kind": 30}]
    source = jsonl(tmp_path / "p.jsonl", rows)
    data = ready(PromptData(train_data=source, tokenizer=words, pack=False, val_fraction=0, route_column="kind"))
    assert data.routes == ["30", "7"]
    assert [row["route"] for row in rows_of(data)] == [[1, 1, 1], [0, 0, 0]]
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }} {% generation %}{{ m.content }} {% endgeneration %}{% endfor %}")
    talk = [{"messages": [{"role": "assistant", "content": "a b"}], "kind": kind} for kind in ("x", "y", "x")]
    common: dict[str, Any] = {"tokenizer": words, "pack": False, "val_fraction": 0, "chat_template": str(template)}
    chat = ready(ChatData(train_data=jsonl(tmp_path / "c.jsonl", talk), route_column="kind", **common))
    assert [row["route"][0] for row in rows_of(chat)] == [0, 1, 0]


def test_a_classifiers_rows_have_one_each(tmp_path: Path, words: str) -> None:
    rows = [{"text": "a b c", "label": "sad", "kind": "long"}, {"text": "d", "label": "glad", "kind": "short"}]
    source = jsonl(tmp_path / "c.jsonl", rows)
    data = ready(ClassificationData(source, words, val_fraction=0, route_column="kind", batch_size=2))
    (batch,) = data.train_dataloader()
    order = batch["sample_ids"].argsort()
    assert data.routes == ["long", "short"]
    assert batch["route"][order].tolist() == [[0], [1]]
    assert batch["labels"][order].tolist() == [[1], [0]]
    assert batch["input_ids"][order].tolist() == [[A, B, C], [D, PAD, PAD]]
    by_label = ready(ClassificationData(source, words, val_fraction=0, route_column="label"))  # an expert for each class
    assert [(row["route"], row["labels"]) for row in rows_of(by_label)] == [([1], [1]), ([0], [0])]


def test_class_labels_of_the_hub_have_names(tmp_path: Path, words: str) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["zeta", "alpha"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "kind": [0, 1, 0]}, features=features)
    rows.to_parquet(tmp_path / "t.parquet")
    data = ready(TextData(train_data=str(tmp_path / "t.parquet"), tokenizer=words, val_fraction=0, pack=False, route_column="kind"))
    assert data.routes == ["alpha", "zeta"]
    assert [row["route"][0] for row in rows_of(data)] == [1, 0, 1]
    datasets.Dataset.from_dict({"text": ["a", "b"], "kind": [1, -1]}, features=features).to_parquet(tmp_path / "hidden.parquet")
    with pytest.raises(DataError, match="row 2: 'kind' is -1, but its names go from 0 to 1"):  # −1 is no name counted from the end
        ready(TextData(train_data=str(tmp_path / "hidden.parquet"), tokenizer=words, val_fraction=0, route_column="kind"))


def test_data_that_name_no_teacher_are_what_they_were(tmp_path: Path, words: str) -> None:
    data = text(tmp_path, words, route_column=None)
    assert data.routes == []
    assert all(set(row) == {"input_ids", "labels", "position_ids"} for row in rows_of(data))
    int32 = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels", "position_ids")})
    by_hand = [
        {"input_ids": [A, B, EOS, C], "labels": [B, EOS, -100, D], "position_ids": [0, 1, 2, 0]},
        {"input_ids": [D, E, EOS, A], "labels": [E, EOS, -100, EOS], "position_ids": [0, 1, 2, 0]},
        {"input_ids": [EOS, PAD, PAD, PAD], "labels": [-100] * 4, "position_ids": [0, 0, 1, 2]},
    ]
    assert data.fingerprint == digest.of_rows(datasets.Dataset.from_list(by_hand, features=int32))
    assert text(tmp_path, words).fingerprint != data.fingerprint


@pytest.mark.parametrize(("value", "said"), [(None, "NoneType"), (0.5, "float"), ("", "str"), (True, "bool")])
def test_rows_that_name_nobody(value: Any, said: str) -> None:
    rows = datasets.Dataset.from_dict({"kind": ["a", "b"] if value == "" else [value, value]})
    rows = rows.map(lambda row, i: {"kind": value if i else row["kind"]}, with_indices=True) if value == "" else rows
    number = 2 if value == "" else 1
    with pytest.raises(DataError, match=rf"'f' row {number}: 'kind' must name a teacher, in text or as a whole number, but is {said}"):
        routes.named(rows, "f", "kind")


def test_no_such_column(tmp_path: Path, words: str) -> None:
    with pytest.raises(
        DataError, match=r"has no column 'knd'; it has text, kind; --data\.route_column=NAME chooses one\. Did you mean 'kind'"
    ):
        text(tmp_path, words, route_column="knd")
