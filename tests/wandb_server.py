"""A W&B server on loopback, as much of one as a run needs, and what a server can do instead of answering."""

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


def upsert(body: str) -> dict[str, Any]:
    """The run as it was asked for."""
    asked = json.loads(body)["variables"]
    project = {"name": asked["project"], "entity": {"name": "e"}}
    bucket = {"id": "1", "name": asked["name"], "displayName": asked["displayName"], "config": "{}", "project": project}
    return {"upsertBucket": {"bucket": bucket, "inserted": True}}


ANSWERS: dict[str, Any] = {  # to the queries of a run by their name; others get nothing
    "UpsertBucket": upsert,
    "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}},
}


@contextmanager
def server(status: int = 200, delay_s: float = 0, answers: dict[str, Any] | None = None) -> Iterator[tuple[int, list[str]]]:
    """Accept every run after `delay_s` seconds and keep what it sends: gives the port, and the bodies of the requests so far."""
    received: list[str] = []
    known = ANSWERS | (answers or {})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path == "/die":
                http.shutdown()
                return http.server_close()
            time.sleep(delay_s)
            received.append(body)
            asked = re.search(r"(?:query|mutation)\s+(\w+)", json.loads(body)["query"]) if self.path == "/graphql" else None
            answer = known.get(asked[1], {}) if asked else {}
            text = json.dumps({"data": answer(body) if callable(answer) else answer}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.block_on_close = False
    Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield http.server_port, received
    finally:
        http.shutdown()
        http.server_close()


def die(port: int) -> None:
    """Have a server refuse connections from now on."""
    with suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/die", data=b"{}", timeout=10)
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)


@contextmanager
def server_that(does: str) -> Iterator[int]:
    """A port that `refuses` connections, `swallows` what it is sent, `refuses the key`, or is `slow`; otherwise a healthy server."""
    with ExitStack() as stack:
        if does in ("refuses", "swallows"):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            if does == "swallows":
                sock.listen(50)
            yield sock.getsockname()[1]
        else:
            status, delay_s = 401 if does == "refuses the key" else 200, 1.5 if does == "is slow" else 0
            yield stack.enter_context(server(status, delay_s))[0]
