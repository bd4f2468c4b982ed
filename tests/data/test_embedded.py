import sysconfig
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from distill.data.embedded import StdlibText, cache_folder, corpus, create, split, train_tokenizer
from distill.types import ConfigError, DataError


def small(**more):
    data = StdlibText(**{"vocab_size": 300, "max_bytes": 300_000, "max_length": 64, "val_fraction": 0.2, **more})
    data.setup()
    return data


@pytest.fixture
def tree(tmp_path):
    for path in ("a.py", "b/c.py", "b/tests/d.py", "test/e.py", "site-packages/f.py", "b/readme.txt", "empty.py"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if path == "empty.py" else f"# {path}\n")
    return tmp_path


def test_corpus_is_sources_without_tests_and_packages(tree):
    assert corpus(tree, None) == {"a.py": "# a.py\n", "b/c.py": "# b/c.py\n"}
    assert len(corpus(tree, 1)) == 1


def test_split_is_by_path_whatever_else_there_is():
    texts = {f"{i}.py": str(i) for i in range(1000)}
    train, held = split(texts, 0.1)
    assert 70 < len(held) < 130
    assert sorted(train + held) == sorted(texts.values())
    assert set(split(dict(list(texts.items())[:500]), 0.1)[1]) == {text for text in held if int(text) < 500}


def test_any_text_comes_back():
    tokenizer = train_tokenizer(["def f(): return 1\n"] * 3, 270)
    for text in ("def g():\n\tpass", "naïve 日本 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 270


def test_rows_are_the_training_files_and_nothing_else():
    data = small()
    train, held = split(corpus(Path(sysconfig.get_path("stdlib")), 300_000), 0.2)
    for rows, texts in ((data.train_set, train), (data.val_set, held)):
        tokens = [token for row in rows.with_format(None) for token in row["input_ids"]]
        while tokens[-1] == data.tokenizer.pad_token_id:
            tokens.pop()
        assert data.tokenizer.decode(tokens) == "".join(text + "<|endoftext|>" for text in texts)
    assert data.num_classes == data.model_config()["vocab_size"] == 300


def called(*_):
    raise AssertionError("not from the cache")


def test_the_second_time_nothing_is_trained_or_encoded(monkeypatch):
    first = small()
    monkeypatch.setattr("distill.data.embedded.train_tokenizer", called)
    monkeypatch.setattr("distill.data.embedded._documents", called)
    again = small()
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    monkeypatch.undo()
    assert len(small(max_length=32).train_set) >= 2 * len(first.train_set) - 1


def fingerprint(_):
    return small(vocab_size=280).fingerprint


def test_two_processes_at_the_same_time():
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        one, two = pool.map(fingerprint, range(2))
    assert one == two


def test_create_leaves_no_half(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyError

    with pytest.raises(KeyError):
        create(tmp_path / "made", fail)
    assert list(tmp_path.iterdir()) == []


def test_create_accepts_that_another_was_faster(tmp_path):
    def overtaken(folder):
        (folder / "mine").write_text("")
        create(tmp_path / "made", lambda other: (other / "theirs").write_text("") and None)

    create(tmp_path / "made", overtaken)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "theirs"]


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "distill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/distill"


def test_mistakes():
    with pytest.raises(ConfigError, match="vocab_size must be at least 258"):
        StdlibText(vocab_size=10)
    with pytest.raises(ConfigError, match="val_fraction must be between 0 and 1"):
        StdlibText(val_fraction=0)
    with pytest.raises(ConfigError, match="max_bytes must be at least 1"):
        StdlibText(max_bytes=0)
    with pytest.raises(DataError, match="max_bytes=10 takes 1 files, too few"):
        small(max_bytes=10)
