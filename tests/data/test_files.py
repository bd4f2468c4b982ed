import json

import datasets
import pytest

from distill.data import files
from distill.types import ConfigError, DataError
from tests.data.helpers import SHARED


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


ROWS = [{"text": 'say "hi"', "label": "NA"}, {"text": "0012", "label": ""}]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        write(path, json.dumps(ROWS))
    elif kind == "jsonl":
        write(path, "\n".join(map(json.dumps, ROWS)) + "\n")
    elif kind == "csv":
        write(path, 'text,label\n"say ""hi""",NA\n0012,\n')
    elif kind == "tsv":
        write(path, 'text\tlabel\nsay "hi"\tNA\n0012\t\n')
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert files.read(str(path), "data.train_data").to_list() == ROWS


def test_a_text_file_is_one_document(tmp_path):
    assert files.read(write(tmp_path / "a.txt", "one\n\ntwo\n"), "k").to_list() == [{"text": "one\n\ntwo\n"}]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    assert len(files.read(write(path, '{"a": 1}\n'), "k")) == 1
    assert len(files.read(write(path, '{"a": 1}\n{"a": 2}\n'), "k")) == 2


def test_names_for_a_file_without_a_header(tmp_path):
    assert files.read(write(tmp_path / "a.tsv", "x\t1\ny\t2\n"), "k", names=["text", "label"])["label"] == ["1", "2"]


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"data.train_data: no file '.*trian.jsonl'; did you mean '.*train.jsonl'\?"):
        files.read(str(tmp_path / "trian.jsonl"), "data.train_data")
    with pytest.raises(DataError, match=f"the nearest folder that exists is '{tmp_path}'"):
        files.read(str(tmp_path / "no" / "such" / "train.jsonl"), "k")
    with pytest.raises(DataError, match=r"no file 'nowhere.csv'"):
        files.read("nowhere.csv", "k")


def test_a_data_set_the_hub_cannot_give(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"k: no file 'org/name:wiki:test' here .* and the hub .*: \('org/name', 'wiki', 'test', 'r1'\)"):
        files.read("org/name:wiki:test", "k", revision="r1")


def refuse(name, config, split, revision):
    raise ConnectionError((name, config, split, revision))


def test_empty(tmp_path):
    with pytest.raises(DataError, match="is an empty file"):
        files.read(write(tmp_path / "a.jsonl", ""), "k")
    with pytest.raises(DataError, match="has no rows"):
        files.read(write(tmp_path / "a.csv", "text,label\n"), "k")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
def test_nothing_but_a_byte_order_mark(tmp_path, kind):
    with pytest.raises(DataError, match=f"k: '.*a.{kind}' is an empty file"):
        files.read(write(tmp_path / f"a.{kind}", "\ufeff"), "k")


def test_unknown_kind_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"of an unknown kind '.docx'; give a file that ends in .txt, .json"):
        files.read(write(tmp_path / "a.docx", "x"), "k")
    with pytest.raises(DataError, match="is a folder"):
        files.read(str(tmp_path), "k")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"a": "x"}\n{"a": "y"\n', "row 2 is not JSON"),
        ('{"a": "x"}\n[1]\n', "row 2 is not an object but list"),
        ('{"a": "x"}\n\n{"a": {"b": 3}}\n', "row 3: 'a' is dict, but str in the rows before"),
    ],
)
def test_unreadable_json_row(tmp_path, lines, message):
    with pytest.raises(DataError, match=f"a.jsonl'.*{message}"):
        files.read(write(tmp_path / "a.jsonl", lines), "k")


def test_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\nfine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"row 3 is not UTF-8 text \(byte 0xe9\)"):
        files.read(str(path), "k")


def test_missing_column():
    rows = datasets.Dataset.from_list([{"text": "a", "lable": 1}])
    assert files.need_columns(rows, "f", {"text": "text", "route_column": None}).column_names == ["text"]
    with pytest.raises(
        DataError, match=r"'f' has no column 'label'; it has text, lable; --data\.label=NAME chooses one\. Did you mean 'lable'\?"
    ):
        files.need_columns(rows, "f", {"text": "text", "label": "label"})


@pytest.mark.parametrize(("values", "message"), [(["a", None], "row 2: 'text' must be text, but is NoneType"), ([3, 4], "row 1: .* int ")])
def test_a_row_that_is_not_text(values, message):
    with pytest.raises(DataError, match=message):
        files.need_text(datasets.Dataset.from_dict({"text": values}), "f", "text")


def test_hold_out_by_content():
    rows = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(200)]})
    train, val = files.hold_out(rows, 0.1, "f")
    assert (len(train), len(val)) == (180, 20)
    assert set(train["text"]) | set(val["text"]) == set(rows["text"])
    again = files.hold_out(rows.select(range(199, -1, -1)), 0.1, "f")
    assert set(again[1]["text"]) == set(val["text"])


def test_hold_out_keeps_equal_rows_together():
    rows = datasets.Dataset.from_dict({"text": [f"t{i % 20}" for i in range(100)]})
    train, val = files.hold_out(rows, 0.12, "f")
    assert not set(train["text"]) & set(val["text"])
    assert 12 <= len(val) <= 16


def test_hold_out_of_too_little():
    one = datasets.Dataset.from_dict({"text": ["a"]})
    assert files.hold_out(one, 0, "f") == (one, None)
    with pytest.raises(DataError, match=r"'f' has 1 row.*data.val_data, or data.val_fraction: 0"):
        files.hold_out(one, 0.05, "f")
    with pytest.raises(ConfigError, match="val_fraction must be at least 0 and less than 1, got 1"):
        files.hold_out(one, 1, "f")


@pytest.mark.skipif(not (SHARED / "goemotions").is_dir(), reason="the GoEmotions files are not here")
def test_goemotions():
    rows = files.read(str(SHARED / "goemotions/dev.tsv"), "k", names=["text", "label", "id"])
    assert len(rows) == 5426
    assert rows[1]["label"] == "4,27"
