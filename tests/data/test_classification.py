import csv

import datasets
import pytest

from distill.data.classification import ClassificationData
from distill.types import ConfigError, DataError
from tests.data.helpers import PAD, SHARED, A, B, C, D, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    return str(path)


def classify(tmp_path, tokenizer, rows, **more):
    data = ClassificationData(train_data=table(tmp_path / "t.csv", rows), tokenizer=tokenizer, **{"val_fraction": 0, **more})
    data.setup()
    return data


def test_a_batch(tmp_path, tokenizer):
    data = classify(tmp_path, tokenizer, [("a b c d", "sad"), ("c", "glad")], batch_size=2, max_length=3)
    (batch,) = data.train_dataloader()
    order = batch["sample_ids"].argsort()
    assert batch["input_ids"][order].tolist() == [[A, B, C], [C, PAD, PAD]]
    assert batch["attention_mask"][order].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"][order].tolist() == [[1], [0]]
    assert batch["num_valid"].item() == 2


def test_model_config_and_example(tmp_path, tokenizer):
    data = classify(tmp_path, tokenizer, [("a b", "sad"), ("c", "glad")])
    assert data.model_config() == {
        "num_labels": 2,
        "id2label": {0: "glad", 1: "sad"},
        "label2id": {"glad": 0, "sad": 1},
        "vocab_size": 16,
        "pad_token_id": PAD,
    }
    assert data.num_classes == 2
    assert data.example() == [("a", False), ("b", False), (" → sad", True)]


def test_numbers_are_sorted_as_numbers(tmp_path, tokenizer):
    assert classify(tmp_path, tokenizer, [("a", 10), ("b", 9), ("c", 2)]).classes == ["2", "9", "10"]


def test_given_classes(tmp_path, tokenizer):
    data = classify(tmp_path, tokenizer, [("a", "x"), ("b", "y")], labels=["y", "z", "x"])
    assert [row["labels"].tolist() for row in data.train_set] == [[2], [0]]
    with pytest.raises(DataError, match=r"t.csv' row 2: the label 'w' is none of the 2 classes \(x, y\)"):
        classify(tmp_path, tokenizer, [("a", "x"), ("b", "w")], labels=["x", "y"])


def test_numbers_are_indices_of_given_classes(tmp_path, tokenizer):
    path = tmp_path / "t.tsv"
    path.write_text("text\tlabel\na\t2\nb\t0\nc\t1\nd\tz\n")
    data = ClassificationData(str(path), tokenizer, labels=["x", "y", "z"], val_fraction=0)
    data.setup()
    assert data.train_set.with_format(None)["labels"][:] == [[2], [0], [1], [2]]
    assert data.model_config()["id2label"] == {0: "x", 1: "y", 2: "z"}
    for label in ("3", "-1"):
        with pytest.raises(DataError, match=f"t.csv' row 2: the label '{label}' is none of the 3 classes"):
            classify(tmp_path, tokenizer, [("a", "0"), ("b", label)], labels=["x", "y", "z"])


def test_numbers_are_names_where_the_given_classes_are_numbers(tmp_path, tokenizer):
    data = classify(tmp_path, tokenizer, [("a", 1), ("b", 2)], labels=["2", "1"])
    assert data.train_set.with_format(None)["labels"][:] == [[1], [0]]
    with pytest.raises(DataError, match=r"row 2: the label '0' is none of the 3 classes \(1, 2, 3\)"):
        classify(tmp_path, tokenizer, [("a", 1), ("b", 0)], labels=["1", "2", "3"])


def hub_table(path, labels):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad"])})
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": labels}, features=features).to_parquet(path)
    return str(path)


def test_class_labels_of_the_hub(tmp_path, tokenizer):
    train, hidden = hub_table(tmp_path / "train.parquet", [1, 0, 1]), hub_table(tmp_path / "hidden.parquet", [1, -1, -1])
    data = ClassificationData(train, tokenizer, labels=["sad", "glad"], val_fraction=0)
    data.setup()
    assert data.train_set.with_format(None)["labels"][:] == [[1], [0], [1]]
    with pytest.raises(DataError, match=r"hidden.parquet' row 2: 'label' is -1, but must be from 0 to 1; -1 stands for a hidden label"):
        ClassificationData(train, tokenizer, test_data=hidden, val_fraction=0).setup()


def test_the_vocabulary_reaches_to_the_highest_id(tmp_path):
    data = classify(tmp_path, word_tokenizer(tmp_path / "gap", gap=4), [("a", "x"), ("assistant", "y")])
    assert data.train_set[1]["input_ids"].tolist() == [19]
    assert data.model_config()["vocab_size"] == 20


@pytest.mark.parametrize("key", ["val_data", "test_data"])
def test_a_label_outside_the_classes(tmp_path, tokenizer, key):
    other = table(tmp_path / "other.csv", [("a", "x"), ("d", "z")])
    with pytest.raises(DataError, match=r"other.csv' row 2: the label 'z' is none of the 2 classes \(x, y\); mend the row, or list"):
        classify(tmp_path, tokenizer, [("a", "x"), ("b", "y")], **{key: other})


def test_classes_are_those_of_the_whole_file_before_the_split(tmp_path, tokenizer):
    data = classify(tmp_path, tokenizer, [(f"a b {i}", f"l{i}") for i in range(6)], val_fraction=0.5)
    assert data.num_classes == 6
    assert (len(data.train_set), len(data.val_set)) == (3, 3)


def test_empty_texts_are_counted(tmp_path, tokenizer):
    data = classify(tmp_path, tokenizer, [("", "x"), ("d", "y")])
    assert data.skipped == {"empty text": 1}
    assert data.train_set[0]["input_ids"].tolist() == [D]


def test_mistakes(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="max_length must be at least 2"):
        ClassificationData("t.csv", tokenizer, max_length=1)
    with pytest.raises(DataError, match="only the label"):
        classify(tmp_path, tokenizer, [("a", "x")])
    with pytest.raises(
        DataError, match=r"has no column 'labels'; it has text, label; --data\.label=NAME chooses one\. Did you mean 'label'"
    ):
        classify(tmp_path, tokenizer, [("a", "x")], label="labels")
    (tmp_path / "f.jsonl").write_text('{"text": "a", "label": 0.5}\n')
    with pytest.raises(DataError, match="row 1: 'label' must be text or a whole number, but is float"):
        ClassificationData(str(tmp_path / "f.jsonl"), tokenizer).setup()
    with pytest.raises(ConfigError, match="neither a pad nor an eos token"):
        classify(tmp_path, word_tokenizer(tmp_path / "bare", pad_token=None, eos_token=None), [("a", "x"), ("b", "y")])


@pytest.mark.skipif(not (SHARED / "banking77").is_dir(), reason="the Banking77 files are not here")
def test_banking77(tokenizer):
    data = ClassificationData(
        str(SHARED / "banking77/train.csv"), tokenizer, test_data=str(SHARED / "banking77/test.csv"), label="category"
    )
    data.setup()
    assert (data.num_classes, len(data.train_set) + len(data.val_set), len(data.test_set)) == (77, 10003, 3080)
