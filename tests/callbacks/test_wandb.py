import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities import rank_zero_only

from distill import signals
from distill.callbacks import wandb as ours
from distill.callbacks.preemption import Preemption
from distill.callbacks.wandb import wandb_logger
from tests.callbacks.tiny import Tiny, loader, trainer
from tests.wandb_server import TAKES_ARTIFACTS, die, server, server_that


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


def offline_folder(err: str, cause: str) -> Path:
    found = re.search(rf"^WANDB IS OFFLINE: .*{cause}.* upload them with: wandb sync (\S+)$", err, re.MULTILINE)
    assert found, err
    return Path(found[1])


def read_back(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def records(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_no_key_trains_offline_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger: Any = wandb_logger("p", tmp_path / "run", {"lr": 0.1})
    t = trainer(logger=logger, max_steps=3)
    t.fit(Tiny(), loader())
    folder = offline_folder(capsys.readouterr().err, "no API key")
    assert folder.parent == tmp_path / "run" / "wandb"
    found = read_back(folder)
    assert found["project"] == "p"
    assert found["name"] == "run"
    assert found["config"] == {"lr": 0.1}
    assert found["state"] == "finished"
    assert found["summary"]["trainer/global_step"] == 2
    assert found["summary"]["loss"] == pytest.approx(t.callback_metrics["loss"].item())


@pytest.mark.parametrize(("kind", "cause"), [("refuses", ""), ("swallows", "deadline exceeded"), ("refuses the key", "401")])
@pytest.mark.parametrize("run_id", [None, "abc123"])
def test_server_that_does_not_answer_means_offline_in_time(
    kind: str, cause: str, run_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if run_id:
        (tmp_path / "wandb_id").write_text(run_id)
    with server_that(kind) as port:
        use_server(monkeypatch, port)
        start = time.monotonic()
        logger: Any = wandb_logger("p", tmp_path, {}, start_timeout_s=1)
        logger.log_metrics({"loss": 1.5}, 7)
        logger.finalize("success")
        wandb.teardown()
        assert time.monotonic() - start < 10  # wandb's own: about 110 s to start, and 20 s to end
    folder = offline_folder(capsys.readouterr().err, cause)
    assert read_back(folder)["summary"]["loss"] == 1.5
    assert logger.version == read_back(folder)["run_id"] == (tmp_path / "wandb_id").read_text()
    if run_id:
        assert logger.version == run_id


def test_server_that_answers_gets_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (port, received):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", tmp_path, {"lr": 0.125})
        logger.log_metrics({"loss": 1.625}, 7)
        logger.finalize("success")
    assert not logger.experiment.offline
    assert not re.search("^WANDB", capsys.readouterr().err, re.MULTILINE)
    assert any("UpsertBucket" in body and "0.125" in body for body in received)
    assert any("wandb-history.jsonl" in body and "1.625" in body for body in received)
    assert any('"complete":true,"exitcode":0' in body for body in received)


def test_server_that_dies_during_training_cannot_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with server() as (port, _):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", tmp_path, {}, finish_timeout_s=2)
    logger.log_metrics({"loss": 1.5}, 7)
    start = time.monotonic()
    logger.finalize("success")
    logger.finalize("success")
    wandb.teardown()
    assert time.monotonic() - start < 12  # more than 7 minutes without finish_timeout
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert read_back(folder)["summary"]["loss"] == 1.5
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WANDB")]
    assert len(lines) == 1
    assert lines[0].startswith("WANDB HAS STOPPED: Timed out")
    assert lines[0].endswith(f"wandb sync {folder}")


def test_a_run_that_fails_is_marked_so(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    logger: Any = wandb_logger("p", tmp_path, {})
    with pytest.raises(ValueError, match="on purpose"):
        trainer(logger=logger, max_steps=3).fit(Tiny(on_train=fail), loader())
    assert read_back(Path(logger.experiment.settings.sync_dir))["state"] == "failed"


@pytest.mark.parametrize(("number", "preempted"), [(signal.SIGUSR1, True), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_run_that_goes_on_later_is_no_failure(number: int, preempted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server shows as preempted: `preempting` and then a status other than 0."""

    def once() -> None:
        """Send it, and wait until it is noted: a second SIGINT would leave at once."""
        os.kill(os.getpid(), number)
        while not signals.received():
            time.sleep(0.01)

    with signals.noted(), server() as (port, received):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", tmp_path, {})
        made = trainer(Preemption(tmp_path), logger=logger, max_steps=3)
        with pytest.raises(signals.Stopped):
            made.fit(Tiny(on_train=once), loader())
    assert any('"preempting":true' in body for body in received) == preempted
    assert any('"complete":true,"exitcode":1' in body for body in received)


def test_the_id_belongs_to_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (wandb_logger("p", tmp_path / name, {}) for name in "aab")
    assert first.version == again.version != other.version
    (tmp_path / "a" / "wandb_id").write_text("")  # torn by a power cut
    assert wandb_logger("p", tmp_path / "a", {}).version not in ("", first.version)


def test_the_id_is_kept_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(**options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", killed)
    with pytest.raises(KeyboardInterrupt):
        wandb_logger("p", tmp_path, {})
    kept = (tmp_path / "wandb_id").read_text()
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_logger("p", tmp_path, {}).version == kept


def test_a_sweeps_agent_gives_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert wandb_logger("p", tmp_path, {}).version == "fromagent"


def student(folder: Path) -> Path:
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_student_is_an_artifact_offline_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, artifact in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        logger: Any = wandb_logger("p", student(tmp_path / name), {}, artifact=artifact)
        logger.finalize("success")
        found = [r for r in records(Path(logger.experiment.settings.sync_dir)) if r["type"] == "artifact"]
        assert [name for r in found for name in files_of(r)] == (["model.safetensors"] if artifact else [])


def files_of(record: dict[str, Any]) -> list[str]:
    return [entry["path"] for entry in record["artifact"]["manifest"]["contents"]]


def test_the_student_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with server(answers=TAKES_ARTIFACTS) as (port, received):
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", student(tmp_path), {}, artifact=True)
        logger.finalize("success")
    asked = [name for body in received for name in ("CreateArtifact ", "CommitArtifact ") if name in body]
    assert asked == ["CreateArtifact ", "CommitArtifact "]
    assert "PUT /model.safetensors weights" in received
    assert any(body.startswith("PUT /manifest ") and "model.safetensors" in body for body in received)
    assert not re.search("^WANDB", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(("kind", "cause"), [("refuses", "the time is up"), ("answers", "Failed to verify credentials")])
def test_a_student_that_cannot_be_uploaded_stops_nothing(
    kind: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ours, "UPLOAD_S", 3.0)
    with server() as (port, _):  # it knows nothing of artifacts, nor whose the key is
        use_server(monkeypatch, port)
        logger: Any = wandb_logger("p", student(tmp_path), {}, artifact=True, finish_timeout_s=2)
        if kind == "refuses":
            die(port)
        logger.log_metrics({"loss": 1.5}, 7)
        start = time.monotonic()
        logger.finalize("success")
        wandb.teardown()
        assert time.monotonic() - start < 15
    said = rf"^WANDB DID NOT TAKE THE STUDENT: {cause}.*\. It is in {tmp_path / 'student'}$"
    assert re.search(said, capsys.readouterr().err, re.MULTILINE)
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert read_back(folder)["summary"]["loss"] == 1.5


def test_what_takes_too_long_or_fails_is_left_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger: Any = wandb_logger("p", tmp_path, {})
    done: list[Any] = []
    start = time.monotonic()
    assert not logger.within(0.2, "THE SLOW", tmp_path, lambda run: time.sleep(30))
    assert time.monotonic() - start < 25
    assert not logger.within(120, "THE BROKEN", tmp_path, lambda run: done[0])
    assert logger.within(120, "THE GOOD", tmp_path, done.append)
    assert done == [logger.experiment]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WANDB")]
    assert lines == [
        f"WANDB DID NOT TAKE THE SLOW: the time is up. It is in {tmp_path}",
        f"WANDB DID NOT TAKE THE BROKEN: list index out of range. It is in {tmp_path}",
    ]
    monkeypatch.setattr(logger, "_lost", True)
    assert not logger.within(120, "NOTHING", tmp_path, done.append)
    assert len(done) == 1


def test_crash_of_wandbs_service_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger: Any = wandb_logger("p", tmp_path, {})

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
        logger: Any = wandb_logger("p", tmp_path, {})
        logger.log_metrics({"loss": 1.5}, 7)
        logger.finalize("success")
    assert received == []
    assert "WANDB IS" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == (1 if mode == "offline" else 0)


def test_a_second_run_in_the_process_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = (wandb_logger("p", tmp_path / name, {}) for name in "ab")
    assert first.version != second.version


def test_wandb_that_cannot_start_at_all_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: Any) -> None:
        raise wandb.Error("no service\nmore")

    monkeypatch.setattr(wandb, "init", broken)
    assert isinstance(wandb_logger("p", tmp_path, {}), DummyLogger)
    assert "WANDB IS OFF: no API key" in (err := capsys.readouterr().err)
    assert "no service. Training goes on" in err


def test_other_ranks_do_not_touch_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(wandb, "init", None)
    logger = wandb_logger("p", tmp_path / "run", {})
    logger.log_metrics({"loss": 1.5}, 7)
    assert isinstance(logger, DummyLogger)
    assert not (tmp_path / "run").exists()


def test_import_does_not_import_wandb() -> None:
    code = "import sys, distill.callbacks.wandb; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
