"""A server whose tokenizer is another is found out, by its vocabulary or by what it makes of texts."""

import json
import warnings
from itertools import pairwise
from typing import Any

import pytest

from distill.teachers.http import Client
from distill.teachers.vocabulary import check_tokens
from distill.types import ConfigError
from tests.models import tokenizer
from tests.teachers import vocabularies
from tests.teachers.serving import Answer, Script, as_json, scripted


def like_vllm(theirs: Any, asked: list[Any]) -> Script:
    """No /about; a tokenizer at /tokenize."""

    def script(path: str, body: bytes) -> Answer:
        if path != "/tokenize":
            return 404, {}, b'{"detail": "Not Found"}'
        asked.append(json.loads(body))
        tokens = theirs(asked[-1]["prompt"], add_special_tokens=asked[-1]["add_special_tokens"])["input_ids"]
        return as_json({"count": len(tokens), "max_model_len": 99, "tokens": tokens, "token_strs": None})

    return script


def check(script: Script, ours: Any) -> dict[str, Any]:
    with scripted(script) as server:
        return check_tokens(Client(120.0, 0), server.url, "it", ours)


def test_texts_are_from_all_over_the_vocabulary() -> None:
    asked: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(like_vllm(tokenizer(5000), asked), tokenizer(5000)) == {}
    assert len(asked) == 16
    assert {(each["model"], each["add_special_tokens"]) for each in asked} == {("it", False)}
    words = " ".join(each["prompt"] for each in asked).split()
    ids = sorted(int(word[1:]) for word in words if word.startswith("w"))
    assert 1900 < len(ids) <= 2048
    assert ids[0] < 10
    assert ids[-1] == 4999
    assert max(b - a for a, b in pairwise(ids)) <= 3


def test_the_first_token_that_differs_is_shown() -> None:
    class Other:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            ids = tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": [77 if i == 20 else i for i in ids]}

    with pytest.raises(ConfigError, match=r"different tokenizers: of 'w18 w19 w20' … token 2 is 77 / 20 \('w20' for the data\)"):
        check(like_vllm(Other(), []), tokenizer())


def test_more_tokens_differ_too() -> None:
    class More:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"], 5]}

    with pytest.raises(ConfigError, match=r"token \d is 5 / none \('its end' for the data\)"):
        check(like_vllm(More(), []), tokenizer())


def test_our_server_tells_every_token() -> None:
    ours = tokenizer()
    about = {"vocabulary": ours.get_vocab(), "described": {"parameters": 3}}
    assert check(lambda path, body: as_json(about), ours) == about
    about["vocabulary"] = {**ours.get_vocab(), "w7": 99}
    with pytest.raises(ConfigError, match=r"different tokenizers .*'w7': 99 / 7"):
        check(lambda path, body: as_json(about), ours)


@pytest.mark.parametrize("answer", [(404, {}, b"nothing"), (200, {}, b"<html>"), as_json([]), as_json({"tokens": None}), as_json({})])
def test_what_cannot_be_checked_is_said(answer: Answer) -> None:
    if answer == as_json({"tokens": None}):
        with pytest.raises(ConfigError, match="/tokenize answers with 'None', not with token ids"):
            check(lambda path, body: answer, tokenizer())
        return
    with pytest.warns(UserWarning, match=r"tells neither its vocabulary \(/about\) nor what it makes of a text \(/tokenize\)"):
        assert check(lambda path, body: answer, tokenizer()) == {}


@pytest.mark.skipif(not vocabularies.has("gpt2_tokenizer"), reason="the GPT-2 vocabulary is not here")
def test_a_real_tokenizer() -> None:
    gpt2 = vocabularies.gpt2()
    assert check(like_vllm(gpt2, []), gpt2) == {}
    later = lambda text, add_special_tokens: {"input_ids": [i + (i > 1000) for i in gpt2(text)["input_ids"]]}
    with pytest.raises(ConfigError, match=r"token \d+ is \d\d+ / \d\d+"):
        check(like_vllm(later, []), gpt2)
