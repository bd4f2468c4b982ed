"""A teacher on other ranks, nodes or machines: `distill serve` runs it, the student's side keeps its head alone."""

import json
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info
from safetensors.torch import load
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from distill import hub
from distill.checks import check_classes
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.wire import KEY, WEIGHTS, pack_batch, unpack_outputs
from distill.types import Batch, ConfigError, Outputs, TrainingError

_MAY_PASS = (502, 503, 504)


class RemoteTeacher(Teacher):
    """A frozen model behind `python train.py serve`: gives the same outputs, to the bit, as it would in memory.

    Args:
        url: of the server, e.g. `http://node3:8100`; of several servers of one model, shared out over the ranks.
        wait_s: how long a server may take to come up.
        timeout_s: how long it may take to answer.
        retries: how often a request is sent again, after 1, 2, 4 … seconds.
    """

    def __init__(self, url: str | list[str], wait_s: float = 300.0, timeout_s: float = 120.0, retries: int = 5) -> None:
        self.urls = [url.rstrip("/") for url in ([url] if isinstance(url, str) else url)]
        if not self.urls or not all(url.startswith(("http://", "https://")) for url in self.urls):
            raise ConfigError(f"model.teacher.url must be like http://node3:8100, got {url!r}")
        for name, value, fine in (
            ("wait_s", wait_s, wait_s >= 0),
            ("timeout_s", timeout_s, timeout_s > 0),
            ("retries", retries, retries >= 0),
        ):
            if not fine:
                raise ConfigError(f"model.teacher.{name} is out of range, got {value:g}")
        self.name, self.wait_s, self.timeout_s, self.retries = self.urls[0], wait_s, timeout_s, retries
        self.shape: PreTrainedModel | None = None
        self.head: nn.Module = nn.Identity()

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Ask what is served, and fetch the head; the server's configuration says what it runs in."""
        if self.shape is not None:
            self.head.to(device)
            return
        key = os.environ.get(KEY)
        self.client = httpx.Client(timeout=self.timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False)
        abouts = [self._wait(url) for url in self.urls]
        self._same(abouts)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.about, self.url = abouts[0], self.urls[rank % len(self.urls)]
        if self.about["unit"] != task.unit:
            raise ConfigError(
                f"model.teacher.url: {self.url} serves a model that predicts one class per {self.about['unit']}, "
                f"but the data want one per {task.unit}"
            )
        with torch.device("meta"):
            self.shape = task.build(_config(self.about["config"])).requires_grad_(False).eval()
        self.head = task.head(self.shape).to_empty(device="cpu")
        weights = load(self._send("GET", "/head"))
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
        body = self._send("POST", "/features", params={"tap": taps}, content=pack_batch(batch), headers=self._meant)
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

    @property
    def _meant(self) -> dict[str, str]:
        return {WEIGHTS: self.about["weights"]}

    def _same(self, abouts: list[dict[str, Any]]) -> None:
        for url, about in zip(self.urls, abouts, strict=True):
            if about["weights"] != abouts[0]["weights"]:
                raise ConfigError(f"model.teacher.url: {url} and {self.urls[0]} serve different weights; start all servers with one model")

    def _wait(self, url: str) -> dict[str, Any]:
        """Ask a server what it is as soon as it is up."""
        end, said = time.monotonic() + self.wait_s, False
        while True:
            try:
                response = self.client.get(f"{url}/about")
                response.raise_for_status() if response.status_code in _MAY_PASS else None
                about: dict[str, Any] = json.loads(self._content(response, url))
                if "weights" not in about:
                    raise ValueError("no weights")
                return about
            except ValueError:
                raise ConfigError(f"model.teacher.url: what answers at {url} is not `python train.py serve`; give its address") from None
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"model.teacher.url: no server at {url} within {self.wait_s:g} s ({_first_line(error)}); start it "
                        "with `python train.py serve --config …`, or raise model.teacher.wait_s"
                    ) from error
            if not said:
                rank_zero_info(f"waiting for the teacher at {url}")
                said = True
            time.sleep(1)

    def _send(self, method: str, path: str, **request: Any) -> bytes:
        """Send a request, again where it fails in a way that may pass."""
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(2 ** (attempt - 1) * random.uniform(0.8, 1.2))  # ranks must not come back all at once
            try:
                response = self.client.request(method, self.url + path, **request)
            except httpx.TransportError as error:
                failure = _first_line(error)
                continue
            if response.status_code in _MAY_PASS:
                failure = f"status {response.status_code}"
                continue
            return self._content(response, self.url)
        raise TrainingError(
            f"the teacher at {self.url} did not answer, {self.retries + 1} times ({failure}); once it is up again, go on "
            "with --ckpt_path last"
        )

    @staticmethod
    def _content(response: httpx.Response, url: str) -> bytes:
        if response.is_success:
            return response.content
        raise TrainingError(f"the teacher at {url} refuses: {response.text[:500] or response.status_code}")


def _config(values: dict[str, Any]) -> Any:
    with TemporaryDirectory() as folder:  # transformers reads its own files best
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return AutoConfig.from_pretrained(folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
