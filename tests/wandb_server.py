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


def upload(name: str) -> dict[str, Any]:
    """Where a file is to be sent: HERE is the server's own address."""
    return {"id": "f", "name": name, "displayName": name, "uploadUrl": f"HERE/{name}", "uploadHeaders": []}


def manifest(body: str) -> dict[str, Any]:
    return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": upload("manifest")}}}


def files(body: str) -> dict[str, Any]:
    names = [file["name"] for file in json.loads(body)["variables"]["input"]["artifactFiles"]]
    nodes = [upload(name) | {"artifact": {"id": "A"}, "storagePath": name, "uploadMultipartUrls": None} for name in names]
    return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}


PROJECT = {"id": "1", "internalId": "1", "name": "p", "entity": {"name": "e"}}
ARTIFACT = {"__typename": "Artifact", "id": "A", "versionIndex": 0, "artifactType": {"name": "model"}, "state": "COMMITTED", "size": 1}
ARTIFACT |= {"artifactSequence": {"__typename": "ArtifactSequence", "name": "s", "project": PROJECT}, "digest": "d", "fileCount": 1}
ARTIFACT |= dict.fromkeys(["description", "metadata", "historyStep", "commitHash", "updatedAt"])
ARTIFACT |= {"ttlDurationSeconds": -1, "ttlIsInherited": False, "tags": [], "aliases": [], "createdAt": "2026-01-01T00:00:00"}
TAKES_ARTIFACTS: dict[str, Any] = {  # of a server that takes them as well
    "Viewer": {"viewer": {"id": "1", "entity": "e", "username": "u", "email": "", "flags": "{}", "admin": False, "teams": {"edges": []}}},
    "ArtifactType": {"project": {"artifact": None}},
    "CreateArtifact": {"createArtifact": {"artifact": {"id": "A", "state": "PENDING", "artifactSequence": {"id": "S"}}}},
    "CreateArtifactManifest": manifest,
    "CreateArtifactFiles": files,
    "CommitArtifact": {"commitArtifact": {"artifact": {"id": "A", "digest": "d"}}},
    "ArtifactByID": {"artifact": ARTIFACT},
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
            text = json.dumps({"data": answer(body) if callable(answer) else answer})
            content = text.replace("HERE", f"http://127.0.0.1:{http.server_port}").encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_PUT(self) -> None:
            received.append(f"PUT {self.path} {self.rfile.read(int(self.headers['Content-Length'])).decode()}")
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

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
