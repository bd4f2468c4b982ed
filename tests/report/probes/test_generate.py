import json

import datasets
import pytest
import torch
from transformers import GPT2Tokenizer

from distill.data.text import PromptData
from distill.report.probes.generate import Question, greedy, questions
from distill.types import Batch
from tests import models
from tests.data.helpers import SHARED
from tests.report.disturbed import CPU

WORDS = ["[PAD]", "[EOS]", "[UNK]", "[END]", "####", *"0123456789", "so"]
EOS, END, MARK, SO = 1, 3, 4, WORDS.index("so")
N = {digit: WORDS.index(digit) for digit in "0123456789"}


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    special = {"additional_special_tokens": ["[END]"]}
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", **special)


def _row(prompt: list[int], completion: list[int], length: int = 0) -> Batch:
    ids = torch.tensor(prompt + completion)
    labels = torch.cat([torch.full((len(prompt) - 1,), -100), torch.tensor([*completion, -100])])
    pad = max(0, length - len(ids))
    mask = torch.cat([torch.ones(len(ids)), torch.zeros(pad)]).long()
    ids, labels = torch.cat([ids, torch.zeros(pad).long()]), torch.cat([labels, torch.full((pad,), -100)])
    return {"input_ids": ids[None], "labels": labels[None], "attention_mask": mask[None]}


def test_a_question_is_a_prompt_and_the_answer_of_its_completion(words):
    batch = _row([5, 6, 7], [SO, MARK, N["4"], EOS], length=10)
    assert questions([batch], words, 16, 32) == [Question([5, 6, 7], "4", 4, EOS)]


def test_completions_without_a_marked_answer_ask_nothing(words):
    rows = [_row([5, 6], [SO, N["4"], EOS]), _row([5, 6], [SO, MARK, EOS]), _row([5, 6], [SO, SO, EOS])]
    assert questions(rows, words, 16, 32) == []


def test_rows_that_were_cut_ask_nothing_and_those_that_end_without_eos_do(words):
    cut = _row([5, 6], [SO, SO, MARK, N["2"]])
    assert questions([cut], words, max_length=6, count=32) == []
    assert questions([cut], words, max_length=7, count=32) == [Question([5, 6], "2", 4, N["2"])]
    whole = _row([5, 6], [SO, MARK, N["4"], EOS])
    assert len(questions([whole], words, max_length=6, count=32)) == 1


def test_where_everything_is_trained_on_nothing_is_asked(words):
    batch = _row([5], [SO, MARK, N["4"], EOS])
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    assert questions([batch], words, 16, 32) == []


def test_the_last_turn_of_a_conversation_is_what_is_asked(words):
    batch = _row([5, 6], [SO, MARK, N["1"], END, 7, 8, SO, MARK, N["2"], END])
    batch["labels"][0, 4:7] = torch.tensor([END, -100, -100])  # positions 5 and 6 predict what the user says
    (found,) = questions([batch], words, 16, 32)
    assert found == Question([5, 6, SO, MARK, N["1"], END, 7, 8], "2", 4, END)


def test_of_packed_rows_the_whole_documents_are_taken(words):
    parts = [_row([5, 6], [SO, MARK, N[d], EOS]) for d in "123"] + [_row([5, 6], [SO, MARK, N["4"]])]
    batch = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(part["input_ids"].shape[1]) for part in parts])[None]
    asked = questions([batch], words, max_length=23, count=32)
    # the first may go on from the row before, the last is cut: 6 + 6 + 6 + 5 positions
    assert [question.answer for question in asked[:2]] == ["2", "3"]
    assert len(asked) == 2


def test_a_packed_row_of_one_document_may_have_begun_before(words):
    batch = _row([5, 6], [SO, MARK, N["1"], EOS])
    batch = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": torch.arange(6)[None]}
    assert questions([batch], words, 6, 32) == []


def test_real_solutions_are_found_and_their_answers_with_them(tmp_path, monkeypatch):
    """PromptData over GSM8K, in the tokens of GPT-2: every held-out row asks, and its answer is the one in the file."""
    if not (SHARED / "gsm8k").is_dir() or not (SHARED / "gpt2_tokenizer").is_dir():
        pytest.skip("GSM8K or the GPT-2 vocabulary is not on this machine")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    vocabulary = {"vocab": "encoder.json", "merges": "vocab.bpe"}
    GPT2Tokenizer(**{key: str(SHARED / "gpt2_tokenizer" / file) for key, file in vocabulary.items()}).save_pretrained(tmp_path / "gpt2")
    lines = [json.loads(line) for line in (SHARED / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    for name, part in (("train", lines[:8]), ("val", lines[8:])):
        rows = [{"prompt": line["question"] + "\n", "completion": line["answer"]} for line in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PromptData(
        train_data=str(tmp_path / "train.jsonl"), val_data=str(tmp_path / "val.jsonl"), tokenizer=str(tmp_path / "gpt2"), pack=False
    )
    data.setup()
    found = questions(list(data.val_dataloader()), data.tokenizer, data.max_length, 1000)
    assert [float(question.answer) for question in found] == [float(line["answer"].split("####")[1].replace(",", "")) for line in lines[8:]]
    assert [data.tokenizer.decode(question.prompt) for question in found] == [line["question"] + "\n" for line in lines[8:]]
    assert [question.length for question in found] == [len(data.tokenizer(line["answer"])["input_ids"]) + 1 for line in lines[8:]]


def test_as_many_as_are_wanted(words):
    rows = [_row([5, 6], [MARK, N[d], EOS]) for d in "12345"]
    assert [question.answer for question in questions(rows, words, 16, 3)] == ["1", "2", "3"]


def _by_hand(model, prompt: list[int], steps: int, ends: set[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_what_is_written_is_the_likeliest_token_every_time(words):
    model = models.causal_lm(vocab_size=len(WORDS)).train()
    rng = torch.Generator().manual_seed(0)
    asked = [
        Question(torch.randint(5, len(WORDS), (int(n),), generator=rng).tolist(), "1", int(size), EOS)
        for n, size in zip(torch.randint(2, 7, (11,), generator=rng), torch.randint(1, 6, (11,), generator=rng), strict=True)
    ]
    texts = greedy(model, asked, words, 0, 16, CPU)
    assert model.training
    model.eval()
    steps = max(question.length for question in asked)
    wanted = [_by_hand(model, question.prompt, steps, {EOS}) for question in asked]
    assert texts == [words.decode(ids, skip_special_tokens=True) for ids in wanted]
    assert len(set(texts)) > 3


def test_it_ends_with_the_special_token_that_solutions_end_in_and_in_the_room_that_rows_have(words):
    model = models.causal_lm(vocab_size=len(WORDS), seed=3)
    prompts = [[a, b] for a in range(5, 15) for b in range(5, 9)]
    loose, ends = ([Question(prompt, "1", 6, last) for prompt in prompts] for last in (SO, END))
    free, ended = (greedy(model, asked, words, 0, 16, CPU) for asked in (loose, ends))
    assert ended == [words.decode(_by_hand(model, prompt, 6, {EOS, END}), skip_special_tokens=True) for prompt in prompts]
    assert free == [words.decode(_by_hand(model, prompt, 6, {EOS}), skip_special_tokens=True) for prompt in prompts]
    assert any("so" in text.split()[:-1] for text in free)  # the last token of those solutions is no special one, and ends nothing
    assert free != ended
    short = greedy(model, loose, words, 0, max_length=5, device=CPU)
    assert max(len(text.split()) for text in short) == 3
