"""Answers in vLLM's form are read, and what is none is said in words."""

import json
import math
from typing import Any

import numpy as np
import pytest

from distill.teachers.logprobs import read
from distill.teachers.prompts import Prompt

PROMPT = Prompt([5, 2, 7], 0, np.array([0, 1]), np.array([1, 2]))


def entry(probs: dict[int, float], own: int | None = None) -> dict[str, Any]:
    """As vLLM does: the prompt's own token first, then by rank; a rank for each, text beside."""
    order = sorted(probs, key=lambda i: -probs[i])
    shown = [*([own] if own in probs else []), *(i for i in order if i != own)]
    return {str(i): {"logprob": math.log(probs[i]), "rank": order.index(i) + 1, "decoded_token": f"t{i}"} for i in shown}


def answer(*entries: Any, index: int = 0) -> bytes:
    return json.dumps({"choices": [{"index": index, "text": "x", "prompt_logprobs": list(entries)}]}).encode()


def one(body: bytes, k: int = 2, num_classes: int = 10) -> tuple[list[list[int]], list[list[float]], list[float]]:
    (known,) = read(body, [PROMPT], k, num_classes)
    return known.ids.tolist(), known.probs.tolist(), known.tail.tolist()


def test_the_k_likeliest_count_and_the_prompts_own_token_beyond_them_does_not() -> None:
    body = answer(None, entry({2: 0.1, 3: 0.5, 4: 0.25}, own=2), entry({7: 0.75, 1: 0.125}, own=7))
    ids, probs, tail = one(body)
    assert ids == [[3, 4], [7, 1]]
    assert np.allclose(probs, [[0.5, 0.25], [0.75, 0.125]], rtol=1e-15)
    assert np.allclose(tail, [0.25, 0.125], rtol=1e-14)


def test_only_positions_with_a_label_are_read() -> None:
    prompt = Prompt([5, 2, 7], 0, np.array([1]), np.array([2]))
    (known,) = read(answer(None, {"nonsense": 1}, entry({7: 0.75, 1: 0.125})), [prompt], 1, 10)
    assert known.ids.tolist() == [[7]]


def test_answers_come_in_any_order() -> None:
    prompts = [Prompt([5, i], 0, np.array([0]), np.array([1])) for i in (1, 2)]
    choices = [{"index": 1, "prompt_logprobs": [None, entry({2: 0.5})]}, {"index": 0, "prompt_logprobs": [None, entry({1: 0.5})]}]
    assert [known.ids.tolist() for known in read(json.dumps({"choices": choices}).encode(), prompts, 1, 10)] == [[[1]], [[2]]]


@pytest.mark.parametrize("rest", [1e-4, 1e-9, 1e-12])
def test_a_small_tail_is_not_lost_in_rounding(rest: float) -> None:
    logp = math.log1p(-rest)
    likely = {"7": {"logprob": logp}}
    (known,) = read(answer(None, likely | {"2": {"logprob": -9999.0}}, likely), [PROMPT], 1, 10)
    assert known.tail[0] == pytest.approx(rest, rel=1e-6)
    assert known.probs[0, 0] + known.tail[0] == pytest.approx(1, abs=1e-15)


def test_with_all_classes_nothing_is_left() -> None:
    probs = {0: 0.5, 1: 0.25, 2: 0.125, 7: 0.125 - 1e-5}  # of five: rounding, and a class that is ruled out
    full = entry(probs) | {"3": {"logprob": -9999.0}}
    prompt = Prompt([5, 2], 0, np.array([0]), np.array([1]))
    full["4"] = full.pop("7")
    (known,) = read(answer(None, full), [prompt], 5, 5)
    assert known.ids.tolist() == [[0, 1, 2, 4, 3]]
    assert known.probs.sum() == pytest.approx(1, abs=1e-15)
    assert known.probs[0, -1] == 0
    assert known.tail.tolist() == [0]


def test_rows_that_pad_the_head_are_left_out_of_the_softmax() -> None:
    padded = entry({0: 0.25, 9: 0.5, 1: 0.15, 2: 0.1})  # 9 is no token of the data
    prompt = Prompt([5, 2], 0, np.array([0]), np.array([1]))
    (known,) = read(answer(None, padded), [prompt], 3, 3)
    assert known.ids.tolist() == [[0, 1, 2]]
    assert np.allclose(known.probs, [[0.5, 0.3, 0.2]])


def test_a_row_of_padding_among_the_likeliest_is_a_gap_at_the_end() -> None:
    few = entry({0: 0.9, 11: 5e-4, 1: 4e-4, 2: 1e-5})
    prompt = Prompt([5, 2], 0, np.array([0]), np.array([1]))
    (known,) = read(answer(None, few), [prompt], 3, 10)
    assert known.ids.tolist() == [[0, 1, -1]]
    assert np.allclose(known.probs, np.array([[0.9, 4e-4, 0]]) / (1 - 5e-4))
    assert known.probs.sum() + known.tail.sum() == pytest.approx(1, abs=1e-12)


def test_where_such_a_row_is_the_likeliest_of_all_a_class_stands_first() -> None:
    ids, probs, tail = one(answer(None, entry({12: 9e-4, 2: 5e-4}, own=2), entry({7: 0.75}, own=7)), k=1)
    assert ids == [[0], [7]]  # a gap would be looked up by `Binned`
    assert np.allclose(probs, [[0.0], [0.75]])
    assert np.allclose(tail, [1.0, 0.25])


def test_a_sum_a_little_above_1_is_rounding() -> None:
    ids, probs, tail = one(answer(None, entry({2: 0.75, 3: 0.2505}), entry({7: 1.0, 3: 1e-9})))
    assert ids == [[2, 3], [7, 3]]
    assert np.allclose(np.sum(probs, 1), 1, atol=1e-12)
    assert tail == [0, 0]


GOOD = entry({2: 0.5, 7: 0.25})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", r"answers with '<html>' …, 6 bytes that are no completions"),
        (b"", "0 bytes that are no completions"),
        (b'{"choices": [{"index": 0, "prompt_lo', "that are no completions"),
        (b"[]", "no completions"),
        (b'{"choices": 3}', "no completions"),
        (b'{"choices": []}', "gives 0 answers to 1 prompts"),
        (answer(None, GOOD, GOOD, index=1), "gives 1 answers to 1 prompts"),
        (b'{"choices": [{"index": 0, "text": "hello"}]}', "gives no prompt_logprobs; vLLM and"),
        (answer(None, GOOD), "gives log-probabilities of 2 tokens to a prompt of 3"),
        (answer(None, GOOD, GOOD, GOOD), "gives log-probabilities of 4 tokens to a prompt of 3"),
        (answer(None, GOOD, None), "says nothing of token 2 of a prompt, which is 7"),
        (answer(None, GOOD, entry({2: 0.5, 3: 0.1})), "says nothing of token 2 of a prompt, which is 7; it has read another"),
        (answer(None, GOOD, entry({7: 0.5})), "gives the log-probabilities of 1 classes, not of 2"),
        (answer(None, GOOD, {"7": {"logprob": float("nan")}, "2": {"logprob": -1.0}}), "gives nan for the log-probability of token 7"),
        (answer(None, GOOD, {"7": {"logprob": None}, "2": {"logprob": -1.0}}), "for the log-probability of token 7, which is not finite"),
        (answer(None, GOOD, {"7": {"logprob": 12.5}, "2": {"logprob": -1.0}}), "gives 12.5 for the log-probability of token 7, .* above 0"),
        (answer(None, GOOD, {"7": {"logprob": "x"}, "2": {"logprob": -1.0}}), "for log-probabilities of token ids"),
        (answer(None, GOOD, {"7": -1.0, "2": -1.0}), "for log-probabilities of token ids"),
        (answer(None, GOOD, {"7": {"logprob": -1.0}, " the": {"logprob": -1.0}}), "for log-probabilities of token ids"),
        (answer(None, GOOD, entry({7: 0.75, 2: 0.26})), r"probabilities with a sum of 1\.0100, above 1; .*raw_logprobs"),
        (answer(None, GOOD, entry({7: 0.75, 12: 0.2})), r"gives token 12 the probability 0\.2, but the data have 10 tokens"),
    ],
)
def test_what_is_no_answer_is_said_in_words(body: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one(body)


def test_all_classes_must_be_there() -> None:
    prompt = Prompt([5, 2], 0, np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match="gives the log-probabilities of 2 classes, not of 4"):
        read(answer(None, entry({1: 0.5, 2: 0.25, 9: 0.25})), [prompt], 4, 4)
