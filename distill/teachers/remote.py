"""A teacher on other ranks, nodes or machines: `distill serve` runs it, the student's side keeps its head alone."""

import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedModel

from distill import hub
from distill.checks import check_classes
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.http import Client, address, check_numbers
from distill.teachers.shape import without_weights
from distill.teachers.wire import WEIGHTS, pack_batch, unpack_outputs
from distill.types import Batch, ConfigError, Outputs


class RemoteTeacher(Teacher):
    """A frozen model behind `python train.py serve`: gives the same outputs, to the bit, as it would in memory.

    Args:
        url: of the server, e.g. `http://node3:8100`; of several servers of one model, shared out over the ranks.
        wait_s: how long a server may take to come up.
        timeout_s: how long it may take to answer.
        retries: how often a request is sent again, see `http.Client`.
    """

    def __init__(self, url: str | list[str], wait_s: float = 300.0, timeout_s: float = 120.0, retries: int = 5) -> None:
        self.urls = [address(url) for url in ([url] if isinstance(url, str) else url)]
        if not self.urls:
            raise ConfigError("model.teacher.url is empty; give the address of a server, e.g. http://node3:8100")
        check_numbers(wait_s=wait_s, timeout_s=timeout_s, retries=retries)
        self.name, self.wait_s, self.timeout_s, self.retries = self.urls[0], wait_s, timeout_s, retries
        self.shape: PreTrainedModel | None = None
        self.head: nn.Module = nn.Identity()

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Ask what is served, and fetch the head; the server's configuration says what it runs in."""
        if self.shape is not None:
            self.head.to(device)
            return
        self.client = Client(self.timeout_s, self.retries)
        abouts = [self._wait(url) for url in self.urls]
        self._same(abouts)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.about, self.url = abouts[0], self.urls[rank % len(self.urls)]
        if self.about["unit"] != task.unit:
            raise ConfigError(
                f"model.teacher.url: {self.url} serves a model that predicts one class per {self.about['unit']}, "
                f"but the data want one per {task.unit}"
            )
        self.shape = without_weights(task, self.about["config"])
        self.head = task.head(self.shape).to_empty(device="cpu")
        weights = load(self.client.send("GET", self.url + "/head"))
        self.head.to(next(iter(weights.values())).dtype if weights else dtype)
        self.head.load_state_dict(weights)
        self.head.requires_grad_(False).to(device)

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Compare the served vocabulary token by token, and for a classifier its labels."""
        assert self.shape is not None, "setup comes first"
        hub.same_tokens(self.about["vocabulary"], tokenizer.get_vocab(), "model.teacher", "data.tokenizer")
        check_classes(self.shape, expected, "model.teacher")

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Send the batch, and put the answer where the batch is."""
        taps = list(taps)
        meant = {WEIGHTS: self.about["weights"]}
        body = self.client.send("POST", self.url + "/features", params={"tap": taps}, content=pack_batch(batch), headers=meant)
        features, seen = unpack_outputs(body, taps)
        device = batch["input_ids"].device
        return Outputs(features.to(device), self.head, {name: tap.to(device) for name, tap in seen.items()})

    def structure(self) -> nn.Module | None:
        """Its layers, without weights."""
        return self.shape

    def describe(self) -> dict[str, Any]:
        """Give what the server counted."""
        described: dict[str, Any] = self.about["described"]
        return described

    def _same(self, abouts: list[dict[str, Any]]) -> None:
        for url, about in zip(self.urls, abouts, strict=True):
            if about["weights"] != abouts[0]["weights"]:
                raise ConfigError(f"model.teacher.url: {url} and {self.urls[0]} serve different weights; start all servers with one model")

    def _wait(self, url: str) -> dict[str, Any]:
        """Ask a server what it is as soon as it is up."""
        body = self.client.wait(url, "/about", self.wait_s, "start it with `python train.py serve --config …`")
        try:
            about: dict[str, Any] = json.loads(body)
            known = "weights" in about
        except (ValueError, TypeError):
            known = False
        if not known:
            raise ConfigError(f"model.teacher.url: what answers at {url} is not `python train.py serve`; give its address")
        return about
