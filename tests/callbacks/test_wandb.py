import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import wandb
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities import rank_zero_only

from distill.callbacks.wandb import wandb_logger
from tests.callbacks.tiny import Tiny, loader, trainer

BUCKET = {"id": "1", "name": "mock", "displayName": "mock", "config": "{}", "project": {"name": "p", "entity": {"name": "e"}}}
ANSWERS = {  # to the queries of a run by their name; others get nothing
    "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}},
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings, no server but one on loopback; nothing is written outside tmp_path."""
    for name in ("API_KEY", "MODE", "BASE_URL", "DIR", "IDENTITY_TOKEN_FILE", "ERROR_REPORTING", "PROJECT", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # set first, so that what the code sets is undone too
        monkeypatch.delenv(f"WANDB_{name}")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


def use_server(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


@contextmanager
def server(status: int = 200) -> Iterator[tuple[int, list[str]]]:
    """As much of a W&B server as a run needs: it accepts every run, and keeps what it is sent."""
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            query = json.loads(received[-1]).get("operationName", "")
            answer = json.dumps({"data": ANSWERS.get(query, {})}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield http.server_port, received
    finally:
        http.shutdown()
        http.server_close()


@contextmanager
def no_server(kind: str) -> Iterator[int]:
    """A port that refuses connections, one that swallows what it is sent, or a server that refuses the key."""
    if kind == "refuses the key":
        with server(status=401) as (port, _):
            yield port
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if kind == "swallows":
            sock.listen(50)
        yield sock.getsockname()[1]


def offline_folder(err: str, cause: str) -> Path:
    found = re.search(rf"^WANDB IS OFFLINE: .*{cause}.* upload them with: wandb sync (\S+)$", err, re.MULTILINE)
    assert found, err
    return Path(found[1])


def read_back(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def test_no_key_trains_offline_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger: Any = wandb_logger("p", "n", tmp_path / "run", {"lr": 0.1})
    t = trainer(logger=logger, max_steps=3)
    t.fit(Tiny(), loader())
    logger.experiment.finish()
    folder = offline_folder(capsys.readouterr().err, "no API key")
    assert folder.parent == tmp_path / "run" / "wandb"
    found = read_back(folder)
    assert found["project"] == "p"
    assert found["name"] == "n"
    assert found["config"] == {"lr": 0.1}
    assert found["summary"]["trainer/global_step"] == 2
    assert found["summary"]["loss"] == pytest.approx(t.callback_metrics["loss"].item())


@pytest.mark.parametrize(("kind", "cause"), [("refuses", ""), ("swallows", "deadline exceeded"), ("refuses the key", "401")])
@pytest.mark.parametrize("run_id", [None, "abc123"])
def test_server_that_does_not_answer_means_offline_in_time(
    kind: str, cause: str, run_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_server(kind) as port:
        use_server(monkeypatch, port)
        start = time.monotonic()
        logger: Any = wandb_logger("p", "n", tmp_path, {}, run_id=run_id, timeout_s=1)
        logger.log_metrics({"loss": 1.5}, 7)
        logger.experiment.finish()
        wandb.teardown()
        assert time.monotonic() - start < 10  # wandb's own: about 110 s to start, and 20 s to end
    folder = offline_folder(capsys.readouterr().err, cause)
    assert read_back(folder)["summary"]["loss"] == 1.5
    if run_id:
        assert logger.version == read_back(folder)["run_id"] == run_id


def test_server_that_answers_gets_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (port, received):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", "n", tmp_path, {"lr": 0.125})
        logger.log_metrics({"loss": 1.625}, 7)
        logger.experiment.finish()
    assert not logger.experiment.offline
    assert "OFFLINE" not in capsys.readouterr().err
    assert any("UpsertBucket" in body and "0.125" in body for body in received)
    assert any("wandb-history.jsonl" in body and "1.625" in body for body in received)


def test_server_that_dies_during_training_cannot_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as (port, _):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", "n", tmp_path, {}, timeout_s=1)
    logger.log_metrics({"loss": 1.5}, 7)
    start = time.monotonic()
    logger.experiment.finish()
    wandb.teardown()
    assert time.monotonic() - start < 15  # more than 7 minutes without finish_timeout
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert read_back(folder)["summary"]["loss"] == 1.5


def test_crash_of_wandbs_service_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger: Any = wandb_logger("p", "n", tmp_path, {})

    def crash() -> None:
        found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout.split()
        for pid in found:
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)  # for the connection to be reset

    t = trainer(logger=logger, max_steps=3)
    t.fit(Tiny(on_train=crash), loader())
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    assert t.global_step == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WANDB HAS STOPPED")]
    assert len(lines) == 1
    assert lines[0].endswith(f"wandb sync {logger.experiment.settings.sync_dir}")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_mode_is_obeyed(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with server() as (port, received):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", "n", tmp_path, {})
        logger.log_metrics({"loss": 1.5}, 7)
        logger.experiment.finish()
    assert received == []
    assert "WANDB IS" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == (1 if mode == "offline" else 0)


def test_a_second_run_in_the_process_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = (wandb_logger("p", name, tmp_path / name, {}) for name in "ab")
    assert first.version != second.version


def test_wandb_that_cannot_start_at_all_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: Any) -> None:
        raise wandb.Error("no service\nmore")

    monkeypatch.setattr(wandb, "init", broken)
    assert isinstance(wandb_logger("p", "n", tmp_path, {}), DummyLogger)
    assert "WANDB IS OFF: no API key" in (err := capsys.readouterr().err)
    assert "no service. Training goes on" in err


def test_other_ranks_do_not_touch_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(wandb, "init", None)
    logger = wandb_logger("p", "n", tmp_path / "run", {})
    logger.log_metrics({"loss": 1.5}, 7)
    assert isinstance(logger, DummyLogger)
    assert not (tmp_path / "run").exists()


def test_import_does_not_import_wandb() -> None:
    code = "import sys, distill.callbacks.wandb; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
