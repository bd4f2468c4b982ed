"""Reading the prompt log-probabilities of an OpenAI-compatible answer, as vLLM gives them; nothing in it is believed unseen.

`choices[i].prompt_logprobs[t]` is null for t = 0, and then `{"id": {"logprob": …, "rank": …, …}, …}`: the distribution of the token after
position t − 1, on the k likeliest classes and the prompt's own token t, which may be none of them. Minus infinity is sent as −9999.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.teachers.prompts import Known, Prompt

TOLERANCE = 1e-3  # of a sum of probabilities: a server may compute in bfloat16


def read(body: bytes, sent: Sequence[Prompt], k: int, num_classes: int) -> list[Known]:
    """Read the answer to a request.

    Args:
        body: JSON.
        sent: the request's prompts.
        k: classes kept at each position; V keeps all, the tail is 0 then.
        num_classes: V, tokens of the data. Heads are wider: probabilities are those given that the token is one of these.

    Raises:
        ValueError: it is no answer to that request; the message continues "the server ".
    """
    return [_known(answer, prompt, k, num_classes) for answer, prompt in zip(_answers(body, len(sent)), sent, strict=True)]


def _answers(body: bytes, count: int) -> list[Any]:
    try:
        choices = {choice["index"]: choice.get("prompt_logprobs") for choice in json.loads(body)["choices"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"answers with {body[:80].decode(errors='replace')!r} …, {len(body):,} bytes that are no completions") from None
    if sorted(choices) != list(range(count)):
        raise ValueError(f"gives {len(choices)} answers to {count} prompts")
    return [choices[i] for i in range(count)]


def _known(answer: Any, prompt: Prompt, k: int, num_classes: int) -> Known:
    if not isinstance(answer, list):
        raise ValueError("gives no prompt_logprobs; vLLM and `python train.py serve` do")
    if len(answer) != len(prompt.tokens):
        raise ValueError(f"gives log-probabilities of {len(answer)} tokens to a prompt of {len(prompt.tokens)}")
    chosen = [answer[i] for i in prompt.entries]
    for i, entry in zip(prompt.entries, chosen, strict=True):
        if not isinstance(entry, dict) or str(prompt.tokens[i]) not in entry:
            raise ValueError(f"says nothing of token {i} of a prompt, which is {prompt.tokens[i]}; it has read another")
    ids, logp = _likeliest_first(chosen)
    return _all(ids, logp, num_classes) if k >= num_classes else _top(ids, logp, k, num_classes)


def _likeliest_first(entries: Sequence[dict[str, Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give ids and log-probabilities as `[M, W]`; −1 and minus infinity fill up."""
    try:
        flat_ids = np.array([int(key) for entry in entries for key in entry], np.int64)
        flat_logp = np.array([item["logprob"] for entry in entries for item in entry.values()], np.float64)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"gives {str(entries[0])[:80]} … for log-probabilities of token ids") from None
    for wrong, what in ((~np.isfinite(flat_logp), "is not finite"), (flat_logp > TOLERANCE, "is above 0")):
        if wrong.any():
            raise ValueError(f"gives {flat_logp[wrong][0]:g} for the log-probability of token {flat_ids[wrong][0]}, which {what}")
    counts = np.array([len(entry) for entry in entries])
    place = np.arange(counts.max()) < counts[:, None]
    ids, logp = np.full(place.shape, -1), np.full(place.shape, -np.inf)
    ids[place], logp[place] = flat_ids, flat_logp
    # by probability, not by `rank`: what comes after the k-th is then the prompt's own token, or as likely as the k-th
    order = np.argsort(-logp, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logp, order, 1)


def _all(ids: NDArray[np.int64], logp: NDArray[np.float64], num_classes: int) -> Known:
    ours = (ids >= 0) & (ids < num_classes)
    _check_count(ours.sum(1), num_classes)
    _check_sum(np.exp(logp).sum(1))
    known = np.argsort(~ours, axis=1, kind="stable")[:, :num_classes]
    probs = np.exp(np.take_along_axis(logp, known, 1))
    return Known(np.take_along_axis(ids, known, 1), probs / probs.sum(1, keepdims=True), np.zeros(len(ids)))


def _top(ids: NDArray[np.int64], logp: NDArray[np.float64], k: int, num_classes: int) -> Known:
    _check_count((ids >= 0).sum(1), k)
    ids, logp = ids[:, :k], logp[:, :k]
    probs = np.exp(logp)
    _check_sum(probs.sum(1))
    tail = np.maximum(-np.expm1(logp[:, 0]) - probs[:, 1:].sum(1), 0.0)  # 1 − Σ p, where the first may be all but 1
    padding = np.where(ids >= num_classes, probs, 0.0)
    if (padding.sum(1) > TOLERANCE).any():
        row = int(padding.sum(1).argmax())
        token, most = ids[row, padding[row].argmax()], padding[row].max()
        raise ValueError(
            f"gives token {token} the probability {most:.3g}, but the data have {num_classes} tokens; its tokenizer is another"
        )
    ours = np.argsort(ids >= num_classes, axis=1, kind="stable")  # a row that pads the head goes to the end, as a gap
    ids, probs = np.take_along_axis(ids, ours, 1), np.take_along_axis(probs, ours, 1)
    ids, probs = np.where(ids < num_classes, ids, -1), np.where(ids < num_classes, probs, 0.0)
    ids[:, 0] = ids[:, 0].clip(min=0)  # where there is nothing but such rows: the first is never a gap
    whole = probs.sum(1) + tail
    return Known(ids, probs / whole[:, None], tail / whole)


def _check_count(counts: NDArray[np.int64], wanted: int) -> None:
    if (counts < wanted).any():
        raise ValueError(f"gives the log-probabilities of {counts.min()} classes, not of {wanted}")


def _check_sum(sums: NDArray[np.float64]) -> None:
    if (sums > 1 + TOLERANCE).any():
        raise ValueError(f"gives probabilities with a sum of {sums.max():.4f}, above 1; vLLM's --logprobs-mode must be raw_logprobs")
