"""As much of a W&B server as a run needs, on loopback: it accepts every run, and keeps what is sent to it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

BUCKET = {
    "id": "1",
    "name": "mock",
    "displayName": "mock",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "2", "name": "p", "entity": {"id": "3", "name": "e"}},
}


class Handler(BaseHTTPRequestHandler):
    received: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.received.append(f"{self.path} {body}")
        data = {"upsertBucket": {"bucket": BUCKET, "inserted": True}} if "mutation UpsertBucket" in body else {"model": None}
        answer = json.dumps({"data": data} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[tuple[str, list[str]]]:
    received: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Recorder", (Handler,), {"received": received}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
