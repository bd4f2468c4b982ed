"""A teacher behind an OpenAI-compatible endpoint that gives prompt log-probabilities, as vLLM and `distill serve` do."""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import torch

from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.http import Client, Refused, address, check_numbers
from distill.teachers.logprobs import read
from distill.teachers.prompts import Known, Prompt, prompts, requests, target
from distill.teachers.vocabulary import check_tokens
from distill.teachers.workers import Workers
from distill.types import Batch, ConfigError, SparseTarget, Support, TrainingError

START = "start vLLM there with --max-logprobs, or `python train.py serve --config …`"


class Coming(NamedTuple):
    """The target of a batch, while it is fetched."""

    key: bytes
    sent: list[Prompt]
    known: "list[Future[list[Known]]]"


class ServedTeacher(Teacher):
    """The k likeliest tokens at every position, at T = 1, from `POST /v1/completions` with `prompt_logprobs`.

    Prompts are one token longer than documents, so vLLM needs `--max-model-len` of at least data.max_length + 2, and `--max-logprobs` of
    at least k (its default is 20). Where it was started with `--api-key`, the key is taken from `DISTILL_SERVE_KEY` of the environment.

    Args:
        url: of the server, e.g. `http://node3:8000`.
        model: by the server's name for it; None for the one that it lists first.
        k: likeliest tokens at each position; as many as the tokenizer has or more: all of them (vLLM: `--max-logprobs -1`).
        wait_s: how long the server may take to come up.
        timeout_s: how long it may take to answer a request.
        retries: how often a request is sent again, see `http.Client`; 8 bridge about three minutes.
        connections: requests at a time.
        request_tokens: most tokens in a request of several documents.

    Raises:
        ConfigError: the address is none, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        k: int = 50,
        wait_s: float = 300.0,
        timeout_s: float = 120.0,
        retries: int = 8,
        connections: int = 4,
        request_tokens: int = 8192,
    ) -> None:
        self.url = address(url).removesuffix("/v1")
        check_numbers(wait_s=wait_s, timeout_s=timeout_s, retries=retries)
        for name, value in (("k", k), ("connections", connections), ("request_tokens", request_tokens)):
            if value < 1:
                raise ConfigError(f"model.teacher.{name} must be at least 1, got {value}")
        self.model, self.k, self.wait_s, self.timeout_s, self.retries = model, k, wait_s, timeout_s, retries
        self.connections, self.request_tokens, self.name = connections, request_tokens, self.url
        self.client: Client | None = None
        self._coming: deque[Coming] = deque()

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Wait for the server, and ask for its model."""
        if self.client is not None:
            return
        if task.unit != "token":
            raise ConfigError(
                f"model.teacher: ServedTeacher gives probabilities of the next token, but the data want one class per {task.unit}; take "
                "OnlineTeacher, or RemoteTeacher with `python train.py serve`"
            )
        client = Client(self.timeout_s, self.retries)
        listed = client.wait(self.url, "/v1/models", self.wait_s, START)
        try:
            models = [str(model["id"]) for model in json.loads(listed)["data"]]
            self.model = self.model or models[0]
        except (ValueError, KeyError, TypeError, IndexError):
            raise ConfigError(f"model.teacher.url: what answers at {self.url} lists no models at /v1/models; {START}") from None
        if self.model not in models:
            raise ConfigError(f"model.teacher.model: {self.url} serves {', '.join(models)}, not '{self.model}'")
        self.name, self.client, self._workers = f"{self.model} at {self.url}", client, Workers(self.connections)

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Compare the tokenizers, see `check_tokens`, and look whether the server gives as many log-probabilities as are wanted."""
        assert self.client is not None, "setup comes first"
        self.about = check_tokens(self.client, self.url, str(self.model), tokenizer)
        self.num_classes = max(tokenizer.get_vocab().values()) + 1
        shortest = torch.zeros(1, 1, dtype=torch.long)
        try:
            self._ask(list(prompts({"input_ids": shortest, "labels": shortest})))
        except TrainingError as error:
            raise ConfigError(f"model.teacher: {error}") from error

    @property
    def support(self) -> Support:
        """The likeliest, and a bin for the rest."""
        return "bins"

    @property
    def temperature(self) -> float:
        """1: the endpoint softens no prompt log-probabilities, whatever `temperature` it is sent."""
        return 1.0

    def ahead(self, batch: Batch) -> None:
        """Send the requests of a batch, while the student is at those before."""
        sent = list(prompts(batch))
        known = [self._workers.submit(partial(self._ask, group)) for group in requests(sent, self.request_tokens)]
        self._coming.append(Coming(_key(batch), sent, known))

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> SparseTarget:
        """Take the answers that were asked for ahead, or ask now."""
        assert not tuple(taps), "without layers no term has taps"
        coming = self._taken(_key(batch))
        if coming is None:
            self.ahead(batch)
            coming = self._coming.pop()
        known = [each for future in coming.known for each in future.result()]
        return target(batch, coming.sent, known, min(self.k, self.num_classes))

    def _taken(self, key: bytes) -> Coming | None:
        number = next((i for i, coming in enumerate(self._coming) if coming.key == key), None)
        if number is None:
            return None
        for _ in range(number):  # batches come in the data's order: those before were left out, and come no more
            self._coming.popleft()
        return self._coming.popleft()

    def _ask(self, sent: Sequence[Prompt]) -> list[Known]:
        assert self.client is not None, "setup comes first"
        asked = {
            "model": self.model,
            "prompt": [prompt.tokens for prompt in sent],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": -1 if self.k >= self.num_classes else self.k,
        }
        try:
            body = self.client.send("POST", f"{self.url}/v1/completions", json=asked)
            return read(body, sent, self.k, self.num_classes)
        except Refused as error:
            longest = max(len(prompt.tokens) for prompt in sent)
            raise TrainingError(
                f"{error}; it was asked for {asked['prompt_logprobs']} log-probabilities (model.teacher.k; of vLLM: --max-logprobs) of "
                f"{len(sent)} prompts (model.teacher.request_tokens) of up to {longest} tokens (--max-model-len)"
            ) from error
        except ValueError as error:
            raise TrainingError(f"the teacher's server at {self.url} {error}") from error

    def describe(self) -> dict[str, Any]:
        """Give what the server says of the model: `distill serve` its size, others nothing."""
        described: dict[str, Any] = self.about.get("described", {})
        return described


def _key(batch: Batch) -> bytes:
    """What tells a batch from others, on whatever device."""
    return b"".join(batch[name].numpy(force=True).tobytes() for name in ("input_ids", "labels"))
