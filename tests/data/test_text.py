import json
import os
import subprocess
import sys

import datasets
import pytest

from distill.data.text import PromptData, TextData
from distill.types import ConfigError, DataError
from tests.data.helpers import BOS, EOS, PAD, SHARED, A, B, C, D, E, F, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(tmp_path, tokenizer, texts, **more):
    data = TextData(
        train_data=jsonl(tmp_path / "t.jsonl", [{"text": t} for t in texts]), tokenizer=tokenizer, **{"val_fraction": 0, **more}
    )
    data.setup()
    return data


def prompts(tmp_path, tokenizer, pairs, **more):
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    data = PromptData(train_data=jsonl(tmp_path / "p.jsonl", rows), tokenizer=tokenizer, **{"val_fraction": 0, **more})
    data.setup()
    return data


def rows_of(data):
    return data.train_set.with_format(None).to_list()


def test_packed_text(tmp_path, tokenizer):
    data = text(tmp_path, tokenizer, ["a b", "c d e"], max_length=4)
    assert rows_of(data) == [
        {"input_ids": [A, B, EOS, C], "labels": [B, EOS, -100, D], "position_ids": [0, 1, 2, 0]},
        {"input_ids": [D, E, EOS, PAD], "labels": [E, EOS, -100, -100], "position_ids": [0, 1, 2, 0]},
    ]
    data.batch_size = 2
    (batch,) = data.train_dataloader()
    assert "attention_mask" not in batch
    assert batch["num_valid"].item() == 5


def test_unpacked_text_is_cut_into_pieces_and_padded(tmp_path, tokenizer):
    data = text(tmp_path, tokenizer, ["a b c d e", "f"], max_length=4, pack=False, batch_size=3)
    assert rows_of(data) == [
        {"input_ids": [A, B, C, D], "labels": [B, C, D, E]},
        {"input_ids": [E, EOS], "labels": [EOS, -100]},
        {"input_ids": [F, EOS], "labels": [EOS, -100]},
    ]
    (batch,) = data.train_dataloader()
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [2, 2, 4]


def test_bos_only_where_the_tokenizer_adds_it(tmp_path):
    own = word_tokenizer(tmp_path / "bos", bos=True)
    assert rows_of(text(tmp_path, own, ["a b"], max_length=4))[0]["input_ids"] == [BOS, A, B, EOS]
    (row,) = rows_of(prompts(tmp_path, own, [("a", "b c")], max_length=5))
    assert row["input_ids"] == [BOS, A, B, C, EOS]
    assert row["labels"] == [-100, B, C, EOS, -100]


def test_prompts_are_not_trained_on(tmp_path, tokenizer):
    data = prompts(tmp_path, tokenizer, [("a b", "c d"), ("e", "f")], pack=False, max_length=8)
    assert rows_of(data) == [
        {"input_ids": [A, B, C, D, EOS], "labels": [-100, C, D, EOS, -100]},
        {"input_ids": [E, F, EOS], "labels": [F, EOS, -100]},
    ]
    assert data.example() == [("a", False), ("b", False), ("c", True), ("d", True), ("<eos>", True)]


@pytest.mark.parametrize("pack", [True, False])
def test_a_prompt_that_fills_the_window_is_counted(tmp_path, tokenizer, pack):
    # three prompt tokens in three positions: the last one still predicts the completion; four do not fit
    data = prompts(tmp_path, tokenizer, [("a b c", "d e"), ("a b c d", "e")], pack=pack, max_length=3)
    assert data.skipped == {"the prompt fills all of max_length=3": 1}
    assert rows_of(data)[0]["labels"] == [-100, -100, D]
    assert data.summary()["skipped"] == "1 × the prompt fills all of max_length=3"


def test_rows_with_nothing_to_train_on_are_counted(tmp_path, tokenizer):
    data = text(tmp_path, tokenizer, ["a b", "", " "], max_length=4)
    assert data.skipped == {"nothing to train on": 2}
    assert len(rows_of(data)) == 1
    again = text(tmp_path, tokenizer, ["a b", "", " "], max_length=4)  # from the cache
    assert again.skipped == data.skipped


def test_everything_skipped(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no row of '.*p.jsonl' can be used: 1 × the prompt fills all of max_length=2, 1 × nothing to"):
        prompts(tmp_path, tokenizer, [("a b c", "d"), ("a", "")], max_length=2)


def test_validation_and_test(tmp_path, tokenizer):
    other = jsonl(tmp_path / "other.jsonl", [{"text": "f f"}])
    data = text(tmp_path, tokenizer, ["a", "b", "c", "d"], max_length=2, val_fraction=0.25, test_data=other)
    assert (len(data.train_set), len(data.val_set)) == (3, 1)
    assert data.test_set[0]["input_ids"].tolist() == [F, F]
    assert len(text(tmp_path, tokenizer, ["a", "b"], max_length=2, val_data=other).val_set) == 2


def test_model_config(tmp_path, tokenizer):
    data = text(tmp_path, tokenizer, ["a b"])
    assert data.model_config() == {"vocab_size": 16, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    assert data.num_classes == 16
    bare = text(tmp_path, word_tokenizer(tmp_path / "bare", pad_token=None), ["a b"])
    assert bare.model_config()["pad_token_id"] == EOS


def test_the_vocabulary_reaches_to_the_highest_id(tmp_path):
    data = text(tmp_path, word_tokenizer(tmp_path / "gap", gap=4), ["a assistant"], max_length=4)
    assert (len(data.tokenizer), rows_of(data)[0]["input_ids"]) == (16, [A, 19, EOS, PAD])
    assert data.num_classes == data.model_config()["vocab_size"] == 20


def test_a_change_of_any_setting_is_not_served_from_the_cache(tmp_path, tokenizer):
    def ids(**more):
        return [row["input_ids"] for row in rows_of(text(tmp_path, more.pop("tokenizer", tokenizer), ["a b c"], **more))]

    assert ids(max_length=4) == [[A, B, C, EOS]]
    assert ids(max_length=2) == [[A, B], [C, EOS]]
    assert ids(max_length=8, pack=False) == [[A, B, C, EOS]]
    assert ids(max_length=5, tokenizer=word_tokenizer(tmp_path / "bos", bos=True)) == [[BOS, A, B, C, EOS]]


@pytest.mark.slow
def test_another_process_has_the_same_fingerprint_and_finds_the_rows_on_disk(tmp_path, tokenizer):
    data = text(tmp_path, tokenizer, ["a b", "c"], max_length=4)
    code = (
        "from distill.data.text import TextData\n"
        f"data = TextData(train_data={data.train_data!r}, tokenizer={tokenizer!r}, val_fraction=0, max_length=4)\n"
        "data.setup(); print(data.fingerprint, data.train_set.cache_files[0]['filename'])"
    )
    env = {**os.environ, "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE), "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.split() == [data.fingerprint, data.train_set.cache_files[0]["filename"]]


def test_mistakes(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"data.max_length must be at least 2"):
        TextData(train_data="x.txt", tokenizer=tokenizer, max_length=1)
    with pytest.raises(ConfigError, match="has no eos token"):
        text(tmp_path, word_tokenizer(tmp_path / "endless", eos_token=None), ["a"])
    with pytest.raises(ConfigError, match=r"data.tokenizer: no folder"):
        text(tmp_path, str(tmp_path / "nowhere"), ["a"])
    with pytest.raises(DataError, match=r"has no column 'text'; it has txt; --data\.text=NAME chooses one\. Did you mean 'txt'"):
        TextData(train_data=jsonl(tmp_path / "c.jsonl", [{"txt": "a"}]), tokenizer=tokenizer).setup()
    with pytest.raises(DataError, match=r"row 2: 'text' must be text, but is NoneType"):
        text(tmp_path, tokenizer, ["a", None])


def test_smaller_than_a_global_batch(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"1 rows, but one optimizer step takes 8"):
        text(tmp_path, tokenizer, ["a b"]).train_dataloader()


@pytest.mark.skipif(not (SHARED / "gpt2_tokenizer").is_dir(), reason="the GPT-2 vocabulary is not here")
@pytest.mark.skipif(not (SHARED / "self_instruct").is_dir(), reason="the Self-Instruct files are not here")
def test_real_instructions_with_a_real_tokenizer(tmp_path):
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer(vocab=str(SHARED / "gpt2_tokenizer/encoder.json"), merges=str(SHARED / "gpt2_tokenizer/vocab.bpe"))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    tasks = [json.loads(line) for line in (SHARED / "self_instruct/seed_tasks.jsonl").read_text().splitlines()]
    pairs = [(task["instruction"] + "\n", task["instances"][0]["output"]) for task in tasks]
    data = prompts(tmp_path, str(tmp_path / "gpt2"), pairs, pack=False, max_length=1024)
    assert len(data.train_set) + sum(data.skipped.values()) == len(pairs) == 175
    labels = [label for label in data.train_set[0]["labels"].tolist() if label != -100]
    assert data.tokenizer.decode(labels) == pairs[0][1] + "<|endoftext|>"
