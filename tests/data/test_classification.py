import csv

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
    with pytest.raises(DataError, match=r"has no column 'labels'; it has text, label. Did you mean 'label'"):
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
