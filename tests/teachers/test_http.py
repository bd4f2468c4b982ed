"""Requests are sent again where that may help, end in any case, and show the key to nobody."""

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from distill.teachers import http
from distill.teachers.http import Client, Refused, address, check_numbers, pause
from distill.teachers.wire import KEY
from distill.types import ConfigError, TrainingError
from tests.teachers.serving import Answer, Script, scripted

SECRET = "sesame-1234"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a client would have waited; it does not."""
    times: list[float] = []
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=times.append, monotonic=time.monotonic))
    return times


def answers(*script: Answer) -> Script:
    """One after the other, the last for ever."""
    left = list(script)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


FINE: Answer = (200, {}, b"fine")


@pytest.mark.parametrize("failure", [(429, {}, b""), (502, {}, b""), (503, {}, b"busy"), (504, {}, b""), None], ids=str)
def test_a_failure_that_may_pass_is_tried_again(failure: Answer, slept: list[float]) -> None:
    with scripted(answers(failure, failure, FINE)) as server:
        assert Client(120.0, 2).send("POST", f"{server.url}/x", content=b"body") == b"fine"
    assert [body for _, _, body in server.asked] == [b"body"] * 3
    assert 1 <= slept[0] <= 1.25
    assert 2 <= slept[1] <= 2.5


@pytest.mark.parametrize("failure", [(503, {}, b'{"error": {"message": "loading"}}'), None], ids=str)
def test_one_that_does_not_pass_is_named(failure: Answer, slept: list[float]) -> None:
    with (
        scripted(answers(failure)) as server,
        pytest.raises(TrainingError, match=r"did not answer, 4 times \(.+\); .* --ckpt_path last") as e,
    ):
        Client(120.0, 3).send("GET", server.url)
    assert len(server.asked) == 4
    assert ("status 503: loading" in str(e.value)) == (failure is not None)


def test_nobody_there(slept: list[float]) -> None:
    with pytest.raises(TrainingError, match=r"at http://127\.0\.0\.1:9/x did not answer, 2 times \(.*refused"):
        Client(5.0, 1).send("GET", "http://127.0.0.1:9/x")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "no such model", "code": 400}}', "no such model"),  # OpenAI's, and vLLM's
        (b'{"object": "error", "message": "too long"}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>oops</html>", "<html>oops</html>"),
        (b'["list"]', r'\["list"\]'),
        (b"", "it does not say why"),
        (b"\xff" * 2000, "�{500} "),
    ],
)
@pytest.mark.parametrize(("status", "verb"), [(400, "refuses"), (500, "fails"), (302, "refuses")])
def test_other_errors_are_named_at_once(body: bytes, said: str, status: int, verb: str, slept: list[float]) -> None:
    headers = {"Location": "http://127.0.0.1:9/"} if status == 302 else {}  # never followed: the key would go along
    with scripted(answers((status, headers, body))) as server, pytest.raises(Refused, match=rf"{verb}: {said} ?\(status {status}\)") as e:
        Client(120.0, 5).send("GET", server.url)
    assert len(server.asked) == 1
    assert e.value.status == status
    assert slept == []


def test_the_server_says_when_to_come_back(slept: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    headers = [{"Retry-After": "7"}, {"Retry-After": soon}, {"Retry-After": "99999"}, {"Retry-After": "whenever"}, {"Retry-After": "0"}]
    with scripted(answers(*((429, header, b"") for header in headers), FINE)) as server:
        assert Client(120.0, 5).send("GET", server.url) == b"fine"
    bounds = [(7, 8.75), (20, 37.5), (60, 75), (8, 10), (16, 20)]
    assert all(low <= time <= high for time, (low, high) in zip(slept, bounds, strict=True)), slept


def test_pauses_grow_up_to_a_minute_and_differ() -> None:
    assert all(2**i <= pause(i) <= 2**i * 1.25 for i in range(6))
    assert 60 <= pause(20) <= 75
    assert len({pause(3) for _ in range(10)}) > 1


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_server_that_hangs_is_left(never: threading.Event, slept: list[float]) -> None:
    def hang(path: str, body: bytes) -> Answer:
        never.wait(120)
        return FINE

    start = time.monotonic()
    with scripted(hang) as server, pytest.raises(TrainingError, match=r"did not answer, 2 times \(timed out\)"):
        Client(0.3, 1).send("GET", server.url)
    assert len(server.asked) == 2
    assert time.monotonic() - start < 60


def test_a_server_that_never_ends_its_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 11.0])  # httpx has its own; the parts come in at once
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    endless = answers((200, {"Content-Length": "2000000"}, b"x" * 10**6))
    with scripted(endless) as server, pytest.raises(http.Passing, match="timed out in mid-answer"):
        Client(10.0, 0).ask("GET", server.url, 10.0)


def test_an_answer_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST", 1000)
    with scripted(answers((200, {}, b"x" * 1001))) as server, pytest.raises(Refused, match="more than 1,000 bytes"):
        Client(120.0, 5).send("GET", server.url)


@pytest.mark.parametrize("status", [401, 503])
def test_nobody_sees_the_key(
    status: int, slept: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY, f" {SECRET}\n")  # as `$(cat file)` leaves it
    caplog.set_level(logging.DEBUG)
    with scripted(lambda path, body: (status, {}, f"wrong key: Bearer {SECRET}".encode())) as server:
        client = Client(120.0, 1)
        with pytest.raises(TrainingError, match="wrong key: Bearer …") as e:
            client.send("GET", server.url)
        with pytest.raises(http.Passing) as p:
            client.ask("GET", "http://127.0.0.1:9", 1.0)
    assert server.asked[0][1]["Authorization"] == f"Bearer {SECRET}"
    shown = [caplog.text, repr(e.value), repr(p.value), repr(client), "".join(traceback.format_exception(e.value)), *capsys.readouterr()]
    assert "httpcore" in caplog.text, "the libraries were listened to"
    assert not any(SECRET in text for text in shown)


def test_nobody_sees_half_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server says is shown up to its 500th character, which may be in mid-key."""
    monkeypatch.setenv(KEY, SECRET)
    with scripted(answers((400, {}, b"x" * 495 + SECRET.encode()))) as server, pytest.raises(Refused) as e:
        Client(120.0, 0).send("GET", server.url)
    assert "xxx…" in str(e.value)
    assert SECRET[:5] not in str(e.value)


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ConfigError, match=f"the key in {KEY} has characters") as e:
        Client(1.0, 0)
    assert key not in str(e.value)


def test_the_key_of_another_service_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv(KEY, raising=False)
    with scripted(answers(FINE)) as server:
        Client(120.0, 0).send("GET", server.url)
    assert "Authorization" not in server.asked[0][1]


def test_one_that_comes_later_is_waited_for(slept: list[float]) -> None:
    with scripted(answers((503, {}, b""), (503, {}, b""), FINE)) as server:
        assert Client(120.0, 0).wait(server.url, "/about", 100.0, "start it") == b"fine"
    assert [path for path, _, _ in server.asked] == ["/about"] * 3
    assert slept == [1.0, 1.0]


def test_one_that_never_comes_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no server at http://127\.0\.0\.1:9 within 0 s \(.*refused.*\); start it, or raise"):
        Client(120.0, 0).wait("http://127.0.0.1:9", "/about", 0.0, "start it")


def test_addresses() -> None:
    assert address("http://node3:8100/") == "http://node3:8100"
    assert address("https://host/base/v1") == "https://host/base/v1"
    for wrong in ("node3:8100", "ftp://host", "http://", "", "http://host:port"):
        with pytest.raises(ConfigError, match=f"must be like http://node3:8100, got {wrong!r}"):
            address(wrong)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@host", f"me:{SECRET}@host", f"http://{SECRET}@host:port"])
def test_a_password_in_an_address_is_refused_unseen(url: str) -> None:
    with pytest.raises(ConfigError, match=f"holds a name or password.*{KEY}") as e:
        address(url)
    assert SECRET not in str(e.value)


def test_numbers() -> None:
    check_numbers(timeout_s=0.1, retries=0, wait_s=0.0)
    for name, value in (("timeout_s", 0.0), ("retries", -1), ("wait_s", -1.0), ("timeout_s", float("nan"))):
        with pytest.raises(ConfigError, match=f"model.teacher.{name} is out of range, got"):
            check_numbers(**{name: value})
