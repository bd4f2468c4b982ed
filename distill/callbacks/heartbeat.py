"""Whether the other ranks are alive: each keeps a connection to rank 0, over which both say so every second.

Rank 0 hears who is gone and tells the others. The process group cannot serve for this: DeepSpeed's ignores the time-out, and a short
one would end a job in which rank 0 measures or prepares data for a while.
"""

import contextlib
import math
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

End = Literal["silent", "died", "failed"]

TICK_S = 0.2  # how often the thread looks whether it shall end


class Lost(NamedTuple):
    """A rank that the job cannot go on without, and how it was lost."""

    rank: int
    host: str
    how: End


@dataclass(eq=False)
class Peer:
    """One end of a connection."""

    socket: socket.socket
    rank: int = -1  # until it has introduced itself
    host: str = "?"
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""

    def send(self, *words: str | int) -> None:
        """Send a line; a connection that is gone is noticed when it is read."""
        with contextlib.suppress(OSError):
            self.socket.send(f"{' '.join(map(str, words))}\n".encode())

    def receive(self) -> list[list[str]]:
        """Give the lines that have come, as words; the last is empty where the connection has ended."""
        lines: list[list[str]] = []
        while True:
            try:
                part = self.socket.recv(4096)
            except BlockingIOError:
                return lines
            except OSError:
                part = b""
            if not part:
                return [*lines, []]
            self.heard = time.monotonic()
            *whole, self.rest = (self.rest + part).split(b"\n")
            lines += [line.decode(errors="replace").split() or ["?"] for line in whole]


class Heartbeat:
    """One rank's thread, which says that it lives and hears whether the others do.

    A rank's word is a line: `hello TOKEN RANK HOST`, `beat`, `bye` (it is done), `failed` (an exception), and from rank 0
    `lost RANK HOST HOW`. A connection that ends without `bye` or `failed` is a death; silence for `patience_s` a stop.

    Args:
        rank: of this process.
        patience_s: seconds of silence after which a rank counts as lost.
        on_lost: called once, in the thread, with the first rank that is lost.
        beat_s: seconds between two beats.
    """

    def __init__(self, rank: int, patience_s: float, on_lost: Callable[[Lost], None], beat_s: float = 1.0) -> None:
        self.rank, self.patience_s, self.on_lost, self.beat_s = rank, patience_s, on_lost, beat_s
        self._peers: list[Peer] = []
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._farewell: str | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._token = ""

    def listen(self, token: str) -> int:
        """Begin as rank 0; give the port.

        Args:
            token: what a rank must know to be heard, for anybody can reach the port.
        """
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._token = token
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        port: int = self._listener.getsockname()[1]
        return port

    def connect(self, host: str, port: int, token: str) -> None:
        """Begin as another rank.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        peer = Peer(socket.create_connection((host, port), timeout=10), rank=0, host=host)
        peer.send("hello", token, self.rank, socket.gethostname())
        self._add(peer)
        self._thread.start()

    def end(self, farewell: Literal["bye", "failed"]) -> None:
        """Say the last word and watch no longer; after a failure look for 1 s whether another rank's death is what it comes from."""
        self._farewell = self._farewell or farewell
        self._thread.join(10)  # it is busy where it ends the process

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._farewell is not None

    def _add(self, peer: Peer) -> None:
        peer.socket.setblocking(False)
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers.append(peer)
        self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()

    def _run(self) -> None:
        try:
            if (lost := self._watch()) is not None:
                self._tell("lost", *lost)
                self.on_lost(lost)
        finally:  # whatever it is: who hears nothing ends the job
            self._tell(self._farewell or "bye")
            for peer in list(self._peers):
                peer.receive()  # unread lines would have the last word reset on its way
                self._drop(peer)
            if self._listener:
                self._listener.close()
            self._selector.close()

    def _watch(self) -> Lost | None:
        """Beat and listen until a rank is lost or this one ends."""
        due = looked = time.monotonic()
        until = math.inf
        while self._farewell != "bye" and looked < until:
            events = self._selector.select(TICK_S)
            now = time.monotonic()
            if (asleep := now - looked - TICK_S) > 1:  # this process stood still, and could not have heard the others
                for peer in self._peers:
                    peer.heard += asleep
            looked = now
            if lost := self._listen(events) or self._silent(now):
                return lost
            if now >= due:
                self._tell("beat")
                due = now + self.beat_s
            if self._farewell == "failed":
                until = min(until, now + 1)
        return None

    def _listen(self, events: list[tuple[selectors.SelectorKey, int]]) -> Lost | None:
        callers = [key.data for key, _ in events]
        if None in callers:
            self._accept()
        found = [self._listen_to(peer) for peer in callers if peer]
        return next((lost for lost in found if lost), None)

    def _tell(self, *words: str | int) -> None:
        for peer in self._peers:
            if peer.rank >= 0:
                peer.send(*words)

    def _accept(self) -> None:
        assert self._listener is not None, "only rank 0 listens"
        with contextlib.suppress(OSError):  # who called is gone again
            self._add(Peer(self._listener.accept()[0]))

    def _silent(self, now: float) -> Lost | None:
        silent = [peer for peer in self._peers if peer.rank >= 0 and now - peer.heard > self.patience_s]
        return Lost(silent[0].rank, silent[0].host, "silent") if silent else None

    def _listen_to(self, peer: Peer) -> Lost | None:
        for words in peer.receive():
            match words:
                case ["hello", token, rank, host] if token == self._token:
                    peer.rank, peer.host = int(rank), host
                case _ if peer.rank < 0:  # none of us
                    self._drop(peer)
                    return None
                case ["lost", rank, host, "silent" | "died" | "failed" as how]:
                    return Lost(int(rank), host, how)
                case ["bye"]:
                    self._drop(peer)
                    return None
                case ["failed"] | []:
                    self._drop(peer)
                    return Lost(peer.rank, peer.host, "failed" if words else "died")
        return None
