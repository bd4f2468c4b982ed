"""Servers on loopback: ours, and one that follows a script."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from distill.teachers.online import OnlineTeacher
from distill.teachers.server import TeacherServer
from tests import pair

Serve = Callable[..., TeacherServer]
Answer = tuple[int, dict[str, str], bytes] | None
Script = Callable[[str, bytes], Answer]
"""From the path and the body of a request to status, headers and body of the answer; None hangs up in mid-answer."""


def url(server: TeacherServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[Serve]:
    """Start servers of the pair's teacher, or of another folder's."""
    servers: list[TeacherServer] = []

    def start(name: str = "teacher", port: int = 0, packs: bool = False, delay_s: float = 0.0) -> TeacherServer:
        data = pair.data(folder)
        data.setup()
        teacher = OnlineTeacher(str(folder / name))
        teacher.setup(data.task(), torch.device("cpu"), torch.float32)
        time.sleep(delay_s)
        server = TeacherServer(("127.0.0.1", port), teacher, data.task(), data.tokenizer, packs)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Scripted(ThreadingHTTPServer):
    """Answers as a script says, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script: Script = script
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: Any) -> None:
        """Keep quiet about clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, dict(self.headers), body))
        answer = self.server.script(self.path, body)
        if answer is None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def scripted(script: Script, port: int = 0) -> Iterator[Scripted]:
    with Scripted(script, port) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, headers, json.dumps(value).encode()
