"""A teacher that answers over HTTP: the features of its head and its taps, for students on other ranks, nodes or machines.

    GET  /about                    configuration, vocabulary, dtype, a digest of the weights, as JSON
    GET  /head                     weights of its head, as safetensors
    POST /features?tap=NAME&…      a batch as safetensors; answers with features and taps

The student's side keeps the head, so that the losses are those of a teacher in memory: D values a token travel, not V.
For clients of the OpenAI API, `ServedTeacher` among them, see `completions`:

    GET  /v1/models
    POST /tokenize
    POST /v1/completions           prompts as token ids; answers with the log-probabilities of the k likeliest tokens
"""

import hashlib
import hmac
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from distill.parallel.same import fingerprint
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.completions import Completions
from distill.teachers.shape import config_values
from distill.teachers.wire import KEY, WEIGHTS, key, pack_outputs, unpack_batch
from distill.types import Outputs

LARGEST = 2**30  # bytes of a batch of ids and masks
LINGER_S = 20.0  # below the 30 s that Slurm leaves by default between SIGTERM and SIGKILL


class TeacherServer(ThreadingHTTPServer):
    """Serves one teacher; requests wait for each other, for there is one model.

    Args:
        address: host and port; port 0 takes a free one, see `server_port`.
        teacher: ready (after `setup` and `check`), with one model in memory.
        task: what it is for.
        tokenizer: the model's.
        packs: whether it was looked at that documents packed into one row do not see each other.
    """

    daemon_threads = True
    request_queue_size = 128  # ranks connect all at once; socketserver lets 5 wait

    def __init__(self, address: tuple[str, int], teacher: Teacher, task: Task, tokenizer: PreTrainedTokenizerBase, packs: bool) -> None:
        super().__init__(address, _Handler)
        self.teacher, self.packs, self.completions = teacher, packs, Completions(teacher, task, tokenizer)
        (model,) = teacher.models()
        self.device = next(model.parameters()).device
        self.about = {
            "name": teacher.name,
            "config": config_values(model),
            "described": teacher.describe(),
            "unit": task.unit,
            "vocabulary": tokenizer.get_vocab(),
            "weights": hashlib.sha256(fingerprint(model).cpu().numpy().tobytes()).hexdigest(),
        }
        head = task.head(model)
        self.head = save({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()})
        self.key, self.lock = key(), threading.Lock()
        self.leaving, self.asked = False, float("-inf")

    def leave(self) -> None:
        """Stop as soon as nobody has asked for 20 s: Slurm tells all of a job to stop at once, and students must end their step first."""
        self.leaving = True

    def service_actions(self) -> None:
        """Look, twice a second, whether it is time to leave."""
        if self.leaving and time.monotonic() - self.asked > LINGER_S:
            self.leaving = False
            threading.Thread(target=self.shutdown, daemon=True).start()  # which waits for the loop that calls this

    def features(self, body: bytes, taps: list[str], weights: str | None) -> bytes:
        """Run the teacher on a batch.

        Raises:
            ValueError: the batch is none that this teacher can take, or meant for other weights than these.
        """
        if weights != self.about["weights"]:
            raise ValueError("this server holds other weights than those that the student began with; start it with the same model")
        batch = unpack_batch(body)
        if "position_ids" in batch and not self.packs:
            raise ValueError("these rows are packed, but the configuration of this server has data.pack=false; serve with the student's")
        with self.lock:
            outputs = self.teacher({name: tensor.to(self.device) for name, tensor in batch.items()}, taps)
            assert isinstance(outputs, Outputs), "a model in memory gives features"
            return pack_outputs(outputs.features, outputs.taps)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong in a request, but for a client that has gone away, e.g. because its time was up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


PATHS = b"there are /about, /head, /features, /tokenize, /v1/models and /v1/completions"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open between steps
    disable_nagle_algorithm = True  # a body follows its headers at once, not after the client's delayed acknowledgement
    server: TeacherServer

    def do_GET(self) -> None:  # http.server's name
        if not self._allowed():
            return
        if self.path == "/about":
            self._answer(200, json.dumps(self.server.about).encode())
        elif self.path == "/head":
            self._answer(200, self.server.head)
        elif self.path == "/v1/models":
            self._answer(200, self.server.completions.models().encode())
        else:
            self._answer(404, PATHS)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._allowed():
            self.close_connection = True  # its body stays unread
            return
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True
            self._answer(413, f"a batch is wanted, of at most {LARGEST:,} bytes".encode())
            return
        body = self.rfile.read(int(length))
        try:
            answer = self._posted(body)
        except ValueError as error:  # the client's mistake, a ConfigError about a tap among them
            self._answer(400, str(error).encode())
        except Exception as error:
            self._answer(500, f"{type(error).__name__}: {error}".encode())
            raise
        else:
            self._answer(404, PATHS) if answer is None else self._answer(200, answer)

    def _posted(self, body: bytes) -> bytes | None:
        self.server.asked = time.monotonic()
        url = urlsplit(self.path)
        if url.path == "/features":
            return self.server.features(body, parse_qs(url.query).get("tap", []), self.headers.get(WEIGHTS))
        with self.server.lock:  # a tokenizer, too, is used by one at a time
            if url.path == "/v1/completions":
                return self.server.completions.complete(body).encode()
            if url.path == "/tokenize":
                return self.server.completions.tokenize(body).encode()
        return None

    def _allowed(self) -> bool:
        key, given = self.server.key, self.headers.get("Authorization", "")
        if key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return True
        self._answer(401, f"this teacher wants a key; put it into {KEY}".encode())
        return False

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: a line a step helps nobody."""
