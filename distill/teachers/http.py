"""Requests to a teacher's server: sent again where a failure may pass, bounded in time and size; the key is never shown."""

import json
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pytorch_lightning.utilities import rank_zero_info

from distill.teachers.wire import KEY, key
from distill.types import ConfigError, TrainingError

MAY_PASS = frozenset({429, 502, 503, 504})  # statuses: too many requests, or nobody behind the gateway for the moment
LONGEST_PAUSE_S = 60.0
LARGEST = 2**32  # bytes of an answer


class Refused(TrainingError):
    """An answer that asking again would not change.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Passing(Exception):
    """A failure that may pass.

    Attributes:
        after_s: how long the server asks to be left alone; None where it does not say.
    """

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class Client:
    """Sends requests, from any thread. Whoever has `DISTILL_SERVE_KEY` in the environment sends it along.

    Only this variable: a key for another service, e.g. in `OPENAI_API_KEY`, must not travel to whatever address a configuration names.

    Args:
        timeout_s: how long the answer to a request may take.
        retries: how often a request is sent again, after 1, 2, 4 … seconds or what the server says (`Retry-After`), see `pause`.

    Raises:
        ConfigError: a number is out of range, or the key has characters that cannot be in a header.
    """

    def __init__(self, timeout_s: float, retries: int) -> None:
        self.timeout_s, self.retries, self._key = timeout_s, retries, key()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, trust_env=False)

    def send(self, method: str, url: str, **request: Any) -> bytes:
        """Send a request, again where it fails in a way that may pass, and give the body of the answer.

        Args:
            method: of HTTP.
            url: with the path.
            **request: as in `httpx.request`.

        Raises:
            Refused: the server answers with an error.
            TrainingError: it does not answer, however often it is asked.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                return self.ask(method, url, self.timeout_s, **request)
            except Passing as failure:
                reason = str(failure)
                if attempt < self.retries:
                    time.sleep(pause(attempt, failure.after_s))
        raise TrainingError(
            f"the teacher at {url} did not answer, {self.retries + 1} times ({reason}); once it is up again, go on with --ckpt_path last"
        )

    def wait(self, url: str, path: str, wait_s: float, start: str) -> bytes:
        """Get a path as soon as the server is up.

        Args:
            url: of the server.
            path: below it.
            wait_s: how long to wait.
            start: what to tell people who have not started it.

        Raises:
            ConfigError: it is not up in time.
            Refused: it answers with an error.
        """
        end, said = time.monotonic() + wait_s, False
        while True:
            left = end - time.monotonic()
            try:
                return self.ask("GET", url + path, min(self.timeout_s, max(left, 5.0)))
            except Passing as failure:
                if left <= 0:
                    raise ConfigError(
                        f"model.teacher.url: no server at {url} within {wait_s:g} s ({failure}); {start}, or raise model.teacher.wait_s"
                    ) from failure
            if not said:
                rank_zero_info(f"waiting for the teacher at {url}, {wait_s:g} s at most")
                said = True
            time.sleep(max(0.0, min(1.0, left)))

    def ask(self, method: str, url: str, timeout_s: float, **request: Any) -> bytes:
        """Send a request once.

        Raises:
            Passing: it fails in a way that may pass.
            Refused: the server answers with an error.
        """
        end = time.monotonic() + timeout_s
        try:
            with self._http.stream(method, url, timeout=timeout_s, **request) as response:
                body = _read(response, end)
        except httpx.RequestError as error:
            raise Passing(self._hidden(_first_line(error))) from error
        if response.is_success:
            return body
        status, said = response.status_code, self._hidden(_message(body))[:500]
        if status in MAY_PASS:
            raise Passing(f"status {status}{said and f': {said}'}", _after_s(response.headers.get("Retry-After")))
        verb = "refuses" if status < 500 else "fails"
        raise Refused(f"the teacher at {url} {verb}: {said or 'it does not say why'} (status {status})", status)

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text  # there are servers that repeat what they were sent


def pause(attempt: int, after_s: float | None = None) -> float:
    """Seconds before a request is sent again: `2^attempt` or what the server asks for, the larger, but 60 at most.

    Up to a quarter longer, by chance, for ranks must not come back all at once.

    Args:
        attempt: how often it was sent again already.
        after_s: what the server asks for.
    """
    return min(max(2.0**attempt, after_s or 0.0), LONGEST_PAUSE_S) * random.uniform(1.0, 1.25)


def check_numbers(**numbers: float) -> None:
    """Refuse settings of a client that are out of range: `timeout_s` above 0, others at least 0.

    Raises:
        ConfigError: one is; the message names it.
    """
    for name, value in numbers.items():
        if not (value > 0 if name == "timeout_s" else value >= 0):
            raise ConfigError(f"model.teacher.{name} is out of range, got {value:g}")


def address(url: str) -> str:
    """Give the address of a server without a slash at its end.

    Raises:
        ConfigError: it is none, or holds a password.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.userinfo or "@" in url:
        raise ConfigError(f"model.teacher.url holds a name or password, which would be in logs and reports; put a key into {KEY} instead")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"model.teacher.url must be like http://node3:8100, got {url!r}")
    return url.rstrip("/")


def _read(response: httpx.Response, end: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise Refused(
                f"the teacher at {response.url} answers with more than {LARGEST:,} bytes; ask for less at a time", response.status_code
            )
        if time.monotonic() > end:  # httpx itself only bounds the time between two parts
            raise httpx.ReadTimeout("timed out in mid-answer")
    return b"".join(parts)


def _message(body: bytes) -> str:
    """What the server says: the message of an OpenAI error, or the text itself."""
    text = body.decode(errors="replace").strip()
    try:
        found = json.loads(text)
    except ValueError:
        return text
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail")
    return found if isinstance(found, str) else text


def _after_s(header: str | None) -> float | None:
    """Seconds that `Retry-After` asks for: a number, or a date."""
    if header is None or header.strip().isdecimal():
        return None if header is None else float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
