import multiprocessing
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import GPT2Tokenizer

from distill.data import digest, profile
from distill.data.base import DistillData
from distill.data.classification import ClassificationData
from distill.data.text import TextData
from distill.types import DataError
from tests.data.helpers import SHARED, WORDS, word_tokenizer

ROWS = [{"labels": [1, -100, 3]}, {"labels": [-100]}, {"labels": []}, {"labels": [3, 3, 0, 4]}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "class_counts"


def slow_counts(rows: datasets.Dataset, num_classes: int) -> list[int]:
    seen = Counter(int(label) for row in rows.with_format(None) for label in row["labels"] if label != -100)
    return [seen[c] for c in range(num_classes)]


def test_by_hand(cache: Path) -> None:
    found = profile.class_counts(datasets.Dataset.from_list(ROWS), 6, "a")
    assert found.tolist() == [1, 1, 0, 3, 1, 0]
    assert found.dtype == np.int64


@pytest.mark.skipif(not (SHARED / "gpt2_tokenizer").is_dir(), reason="the GPT-2 vocabulary is not here")
@pytest.mark.skipif(not (SHARED / "tinyshakespeare").is_dir(), reason="the Shakespeare text is not here")
def test_real_token_rows(cache: Path, tmp_path: Path) -> None:
    files = {"vocab": "encoder.json", "merges": "vocab.bpe"}
    GPT2Tokenizer(**{key: str(SHARED / "gpt2_tokenizer" / file) for key, file in files.items()}).save_pretrained(tmp_path / "gpt2")
    part = tmp_path / "part.txt"
    part.write_text((SHARED / "tinyshakespeare/input.txt").read_text(encoding="utf-8")[:100_000], encoding="utf-8")
    data = TextData(train_data=str(part), tokenizer=str(tmp_path / "gpt2"), val_fraction=0, max_length=64)
    data.setup()
    assert data.class_counts().tolist() == slow_counts(data.train_set, data.num_classes)
    assert int(data.class_counts().sum()) == digest.valid_positions(data.train_set) > 20_000
    assert data.class_name(262) == " the"
    some = data.train_set.select(range(3, len(data.train_set), 2))
    assert profile.class_counts(some, data.num_classes, digest.of_rows(some)).tolist() == slow_counts(some, data.num_classes)


def test_more_rows_than_a_batch(cache: Path) -> None:
    labels = np.random.default_rng(0).integers(-1, 50, (2500, 3))
    rows = datasets.Dataset.from_dict({"labels": np.where(labels < 0, -100, labels).tolist()})
    assert profile.class_counts(rows, 50, "b").tolist() == np.bincount(labels[labels >= 0], minlength=50).tolist()


def test_what_is_kept_is_not_counted_again(cache: Path) -> None:
    first = profile.class_counts(datasets.Dataset.from_list(ROWS), 6, "same")
    poison = datasets.Dataset.from_list([{"labels": [5]}])
    assert profile.class_counts(poison, 6, "same").tolist() == first.tolist()
    assert profile.class_counts(poison, 6, "another").tolist() == [0, 0, 0, 0, 0, 1]
    assert profile.class_counts(poison, 7, "same").tolist() == [0, 0, 0, 0, 0, 1, 0]  # another number of classes
    assert profile.class_counts(poison, 6, "same").tolist() == first.tolist()  # each number has its own
    for file in cache.iterdir():
        file.unlink()
    assert profile.class_counts(poison, 6, "same").tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-8], lambda b: b + b"\0" * 8, lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_file_is_counted_anew_and_mended(cache: Path, damage: object) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    profile.class_counts(rows, 6, "a")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))  # type: ignore[operator]
    assert profile.class_counts(rows, 6, "a").tolist() == [1, 1, 0, 3, 1, 0]
    assert file.read_bytes() == whole


def test_whole_counts_of_another_size_are_not_taken(cache: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    profile.class_counts(rows, 6, "a")
    profile.class_counts(rows, 7, "a")
    (cache / "a-7").replace(cache / "a-6")
    assert profile.class_counts(rows, 6, "a").tolist() == [1, 1, 0, 3, 1, 0]


def test_a_write_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        profile.class_counts(datasets.Dataset.from_list(ROWS), 6, "a")
    assert list(cache.iterdir()) == []


def _count_often(folder: Path, barrier: object, results: object) -> None:
    datasets.config.HF_DATASETS_CACHE = folder
    rows = datasets.Dataset.from_list(ROWS)
    for i in range(50):
        barrier.wait(30)  # type: ignore[attr-defined]
        results.put(profile.class_counts(rows, 6, f"at once {i}").tolist())  # type: ignore[attr-defined]


def test_two_processes_at_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_count_often, args=(cache.parent, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in range(100)]
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert all(counts == [1, 1, 0, 3, 1, 0] for counts in found)
    assert len(list(cache.iterdir())) == 50  # and no temporary file


@pytest.mark.parametrize("label", [6, -1])
def test_a_label_that_is_no_class(cache: Path, label: int) -> None:
    with pytest.raises(DataError, match=r"labels from .* but there are 6 classes, 0 to 5; a position without a label must have -100"):
        profile.class_counts(datasets.Dataset.from_list([{"labels": [label, 2]}]), 6, "a")
    assert not cache.exists()


def classifier(tmp_path: Path) -> ClassificationData:
    (tmp_path / "rows.csv").write_text("text,label\na b,yes\nc,no\nd e,yes\nf,yes\n")
    data = ClassificationData(str(tmp_path / "rows.csv"), word_tokenizer(tmp_path / "tok"), val_fraction=0, labels=["no", "yes", "perhaps"])
    data.setup()
    return data


def test_counts_and_names_of_a_classifier(cache: Path, tmp_path: Path) -> None:
    data = classifier(tmp_path)
    found = data.class_counts()
    assert found.tolist() == [1, 3, 0]
    assert found.dtype == torch.int64
    assert [data.class_name(i) for i in range(3)] == ["no", "yes", "perhaps"]


def test_the_data_module_hashes_its_rows_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, hashed = classifier(tmp_path), []

    def fingerprint(_: DistillData) -> str:
        hashed.append(1)
        return "x"

    monkeypatch.setattr(DistillData, "fingerprint", property(fingerprint))
    data.class_counts()
    data.class_counts()
    assert len(hashed) == 1


def test_names_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b c d e f g h")
    data = TextData(train_data=str(tmp_path / "text.txt"), tokenizer=word_tokenizer(tmp_path / "tok"), val_fraction=0, max_length=4)
    data.setup()
    assert data.class_name(WORDS.index("c")) == "c"


def test_profile_by_hand() -> None:
    found = profile.profile(np.array([400, 0, 101, 100, 20, 19, 1, 0]))
    assert found == {
        "classes": 8,
        "never": 2,
        "fewest": 1,
        "most": 400,
        "imbalance": 400.0,
        "head": {"classes": 2, "labels": 501},
        "medium": {"classes": 2, "labels": 120},
        "few": {"classes": 2, "labels": 20},
        "counts": [400, 0, 101, 100, 20, 19, 1, 0],
    }
