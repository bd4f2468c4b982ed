"""The heartbeats of several ranks, in one process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from distill.callbacks.heartbeat import Heartbeat, Lost, Peer

HOST = socket.gethostname()


@contextmanager
def ranks(count: int, patience_s: float = 60) -> Iterator[tuple[list[Heartbeat], list[list[Lost]], int]]:
    """Connected ranks, what each has been told of, and the port of rank 0."""
    told: list[list[Lost]] = [[] for _ in range(count)]
    hearts = [Heartbeat(i, patience_s, told[i].append, beat_s=0.1) for i in range(count)]
    port = hearts[0].listen("secret")
    for heart in hearts[1:]:
        heart.connect("127.0.0.1", port, "secret")
    wait(lambda: sorted(peer.rank for peer in hearts[0]._peers) == list(range(1, count)))
    yield hearts, told, port
    for heart in hearts:
        heart.end("bye")
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.02)


def cut(heart: Heartbeat) -> None:
    """What the kernel does where a process dies."""
    heart._peers[0].socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_that_say_goodbye_are_not_missed(order: tuple[int, ...]) -> None:
    with ranks(3, patience_s=1) as (hearts, told, _):
        for i in order:
            hearts[i].end("bye")
            time.sleep(1.5)  # longer than the patience
    assert told == [[], [], []]


def test_silence_longer_than_the_patience_is_fine_with_beats() -> None:
    with ranks(2, patience_s=1) as (_, told, _):
        time.sleep(3)
    assert told == [[], []]


def test_all_hear_of_a_death() -> None:
    with ranks(3) as (hearts, told, _):
        cut(hearts[2])
        wait(lambda: all(told[:2]))
    assert told[0] == told[1] == [Lost(2, HOST, "died")]


def test_all_hear_of_the_death_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(3) as (hearts, told, _):
        monkeypatch.setattr(hearts[0], "_tell", lambda *words: None)
        for peer in list(hearts[0]._peers):
            with suppress(OSError):  # it ends all, once it finds one ended
                peer.socket.shutdown(socket.SHUT_RDWR)
        wait(lambda: all(told[1:]))
    assert told[1] == told[2] == [Lost(0, "127.0.0.1", "died")]


@pytest.mark.parametrize("who", [0, 1])
def test_all_hear_of_a_failure(who: int) -> None:
    with ranks(3) as (hearts, told, _):
        hearts[who].end("failed")
        others = [told[i] for i in range(3) if i != who]
        wait(lambda: all(others))
    assert {(lost.rank, lost.how) for heard in others for lost in heard} == {(who, "failed")}
    assert told[who] == []


def test_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(3, patience_s=2) as (hearts, told, _):
        monkeypatch.setattr(hearts[1], "_tell", lambda *words: None)
        start = time.monotonic()
        wait(lambda: bool(told[0] and told[2]))
        assert time.monotonic() - start > 1.5
    assert told[0] == told[2] == [Lost(1, HOST, "silent")]


def test_the_failure_that_a_death_brings_about_names_the_death() -> None:
    with ranks(2) as (hearts, told, _):
        threading.Timer(0.4, cut, [hearts[1]]).start()
        hearts[0].end("failed")  # its collective broke before the end of the connection was seen
    assert told[0] == [Lost(1, HOST, "died")]


def test_a_rank_that_stood_still_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(2, patience_s=2) as (hearts, told, _):
        hearts[1].patience_s = 60
        selector, naps = hearts[0]._selector, iter([5.0])
        select = selector.select

        def nap(timeout: float) -> list[Any]:
            time.sleep(next(naps, 0))
            return []  # what rank 1 has said meanwhile has not come through yet

        monkeypatch.setattr(selector, "select", nap)
        time.sleep(6)
        monkeypatch.setattr(selector, "select", select)
        time.sleep(0.5)
        assert told[0] == []


def test_strangers_are_not_listened_to() -> None:
    with ranks(2) as (hearts, told, port):
        for line in (b"hello wrong 1 me\n", b"lost 1 me died\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(line)
        silent = socket.create_connection(("127.0.0.1", port))
        wait(lambda: len(hearts[0]._peers) == 2)
        silent.close()
        wait(lambda: len(hearts[0]._peers) == 1)
    assert told == [[], []]


def test_lines_that_come_in_pieces() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    peer = Peer(ours, 1, "h")
    theirs.sendall(b"beat\nfai")
    assert peer.receive() == [["beat"]]
    theirs.sendall(b"led\n")
    theirs.close()
    assert peer.receive() == [["failed"], []]


def test_no_rank_0_is_an_error_of_the_network() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            Heartbeat(1, 60, print).connect("127.0.0.1", free.getsockname()[1], "secret")
