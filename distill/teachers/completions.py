"""The part of the OpenAI API that a teacher needs, as vLLM answers it: prompt log-probabilities, for any model of transformers."""

import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.checks import check_length
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.types import Outputs

POSITIONS = 2**13  # that run through the model at a time
LOGITS = 2**24  # float32 values at a time: 64 MiB
LEAST = -9999.0  # JSON has no −inf


class Completions:
    """Answers for one model; it generates nothing.

    Args:
        teacher: ready (after `setup` and `check`), with one model in memory.
        task: what it is for.
        tokenizer: the model's; its tokens are the classes, rows that pad the head are left out before the softmax.
    """

    def __init__(self, teacher: Teacher, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.teacher, self.task, self.tokenizer = teacher, task, tokenizer
        (self.model,) = teacher.models()
        self.device = next(self.model.parameters()).device
        self.num_classes = max(tokenizer.get_vocab().values()) + 1

    def models(self) -> str:
        """Answer `GET /v1/models`."""
        return json.dumps({"object": "list", "data": [{"id": self.teacher.name, "object": "model", "owned_by": "distill"}]})

    def tokenize(self, body: bytes) -> str:
        """Answer `POST /tokenize`.

        Raises:
            ValueError: it is no such request.
        """
        asked = self._asked(body)
        if not isinstance(asked.get("prompt"), str):
            raise ValueError("prompt must be a text")
        tokens = self.tokenizer(asked["prompt"], add_special_tokens=bool(asked.get("add_special_tokens", True)))["input_ids"]
        return json.dumps({"count": len(tokens), "tokens": tokens})

    def complete(self, body: bytes) -> str:
        """Answer `POST /v1/completions`: `prompt_logprobs` of each prompt, −1 for those of all tokens.

        Raises:
            ValueError: it is no such request, or one of a kind that this server does not answer.
        """
        if self.task.unit != "token":
            raise ValueError(f"this model predicts one class per {self.task.unit}, and completes nothing; RemoteTeacher can ask it")
        asked = self._asked(body)
        for name, fine in (("max_tokens", (0, 1, None)), ("n", (1, None)), ("stream", (False, None)), ("echo", (False, None))):
            if asked.get(name) not in fine:
                raise ValueError(f"this server gives prompt_logprobs and generates nothing: {name} must be {fine[0]}, got {asked[name]}")
        k = asked.get("prompt_logprobs")
        if not isinstance(k, int) or not (k == -1 or 0 <= k <= self.num_classes):
            raise ValueError(f"prompt_logprobs must be from 0 to {self.num_classes}, or -1 for all, got {k}")
        prompts = self._prompts(asked.get("prompt"))
        choices = (
            f'{{"index":{i},"text":"","logprobs":null,"finish_reason":"length","prompt_logprobs":{entries}}}'
            for i, entries in enumerate(self._logprobs(prompts, self.num_classes if k == -1 else k))
        )
        count = sum(len(prompt) for prompt in prompts)
        return (
            f'{{"id":"cmpl-0","object":"text_completion","created":{int(time.time())},"model":{json.dumps(self.teacher.name)},'
            f'"choices":[{",".join(choices)}],"usage":{{"prompt_tokens":{count},"completion_tokens":0,"total_tokens":{count}}}}}'
        )

    def _asked(self, body: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(body)
        except ValueError as error:
            raise ValueError(f"the body is no JSON: {error}") from None
        if not isinstance(asked, dict):
            raise ValueError(f"the body must be a JSON object, got {type(asked).__name__}")
        if asked.get("model") not in (None, self.teacher.name):
            raise ValueError(f"the model here is {self.teacher.name}, not {asked['model']}")
        return asked

    def _prompts(self, given: Any) -> list[list[int]]:
        listed = given if isinstance(given, list) and given and isinstance(given[0], list | str) else [given]
        prompts = [self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in listed]
        for prompt in prompts:
            if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
                raise ValueError("prompt must be a text, a list of token ids, or a list of those, none of them empty")
            if not 0 <= min(prompt) <= max(prompt) < self.num_classes:
                raise ValueError(f"token ids go from 0 to {self.num_classes - 1}; the prompt has {min(prompt)} to {max(prompt)}")
        check_length(self.model, max(len(prompt) for prompt in prompts) - 1, "the teacher")  # nothing is asked of the last token
        return prompts

    def _logprobs(self, prompts: Sequence[list[int]], k: int) -> Iterator[str]:
        """Give the entries of every prompt, as JSON."""
        start = 0
        while start < len(prompts):
            longest, stop = len(prompts[start]), start + 1
            while stop < len(prompts) and (stop + 1 - start) * max(longest, len(prompts[stop])) <= POSITIONS:
                longest, stop = max(longest, len(prompts[stop])), stop + 1
            yield from self._together(prompts[start:stop], k)
            start = stop

    @torch.no_grad()
    def _together(self, prompts: Sequence[list[int]], k: int) -> Iterator[str]:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        has_next = torch.arange(tokens.shape[1] - 1) < lengths[:, None] - 1
        following = tokens[:, 1:][has_next]
        entries: Iterator[str] = iter(())
        if len(following):
            batch = {"input_ids": tokens[:, :-1].to(self.device), "attention_mask": has_next.long().to(self.device)}
            outputs = self.teacher(batch)
            assert isinstance(outputs, Outputs), "a model in memory gives features"
            there = outputs.features.device  # of an offloaded model another than where its weights are
            entries = self._entries(outputs, has_next.to(there), following.to(there), k)
        for length in lengths.tolist():
            yield f"[{','.join(['null', *islice(entries, length - 1)])}]"

    def _entries(self, outputs: Outputs, valid: Tensor, following: Tensor, k: int) -> Iterator[str]:
        features = outputs.features[valid]
        for rows in torch.arange(len(features), device=features.device).split(max(1, LOGITS // self.num_classes)):
            logp = outputs.head(features[rows])[:, : self.num_classes].float().log_softmax(-1)
            top, ids = logp.topk(k)
            own = logp.gather(1, following[rows, None])
            ranks = (logp >= own).sum(1)
            for entry in zip(ids.tolist(), top.tolist(), following[rows].tolist(), own[:, 0].tolist(), ranks.tolist(), strict=True):
                yield _entry(*entry)


def _entry(ids: list[int], top: list[float], own_id: int, own: float, rank: int) -> str:
    """The likeliest tokens, then the prompt's own where it is none of them; 9 digits tell every float32 from the next."""
    shown = [f'"{i}":{{"logprob":{max(p, LEAST):.9g},"rank":{r}}}' for r, (i, p) in enumerate(zip(ids, top, strict=True), start=1)]
    if own_id not in ids:
        shown.append(f'"{own_id}":{{"logprob":{max(own, LEAST):.9g},"rank":{rank}}}')
    return f"{{{','.join(shown)}}}"
