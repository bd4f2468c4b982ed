"""Weights & Biases that can neither stop nor hang a run."""

import contextlib
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.utilities import rank_zero_only

UPLOAD_S, BYTES_PER_S = 60.0, 5e6  # what an artifact has at least, and the slowest line that is waited for


def wandb_logger(
    project: str,
    folder: Path,
    config: dict[str, Any],
    artifact: bool = False,
    start_timeout_s: float = 8,
    finish_timeout_s: float = 12,
) -> Logger:
    """Start a run: online if there is a key and the server answers in time, else offline, with a line on stderr that says why.

    `WANDB_MODE=offline` and `disabled`, and `wandb offline`, are obeyed. A key is never asked for: a prompt would hang a batch job.
    The run's id is kept in `folder/wandb_id`, so that a folder is one run on the server however often it is started; a sweep's
    agent gives it. The run ends with Lightning's `finalize`. What is not uploaded in time is given up; all of it is on disk, for
    `wandb sync`. A server that is away costs `start_timeout_s + finish_timeout_s` at most.

    Args:
        project: project on the server.
        folder: the run's folder, after which it is named; wandb writes to `folder/wandb`.
        config: shown on the server beside the run.
        artifact: whether `folder/student` is uploaded after training that went well; waits one minute and 1 s for every 5 MB at most.
        start_timeout_s: seconds the server has to answer at the start.
        finish_timeout_s: seconds it has to take the rest at the end.

    Returns:
        On rank zero Lightning's logger of the run; on other ranks, and where wandb cannot start at all, one that does nothing.
    """
    options = {"project": project, "name": folder.name, "dir": str(folder), "config": config}
    run = rank_zero_only(_start)(options, start_timeout_s, finish_timeout_s)
    if run is None:
        return DummyLogger()
    # what WandbLogger does for a run of its own making: optimizer steps on the x axis
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return Tracked(folder / "student" if artifact else None, project=project, save_dir=str(folder), experiment=run)


class Tracked(WandbLogger):
    """Lightning's logger, for which nothing that happens to wandb or its server is a reason to end training, or not to end it."""

    _lost = False

    def __init__(self, artifact: Path | None, **options: Any) -> None:
        super().__init__(**options)
        self._artifact = artifact

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log."""
        self._attempt(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log."""
        self._attempt(super().log_hyperparams, params)

    def preempted(self) -> None:
        """Let the server show a run that is stopped in mid-training, to go on later, as preempted; to be called before `finalize`.

        The server takes a run that has said so and ends with a status other than 0 for preempted instead of failed.
        """
        self._attempt(self.experiment.mark_preempting)

    def finalize(self, status: str) -> None:
        """Upload the student where it is asked for, and end the run: both in bounded time, where wandb's own end is at the exit."""
        if status == "success" and self._artifact is not None:
            self._upload(self._artifact)
        self._attempt(self.experiment.finish, int(status != "success"))

    def _upload(self, folder: Path) -> None:
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        self.within(
            UPLOAD_S + size / BYTES_PER_S, "THE STUDENT", folder, lambda run: _log_artifact(run, f"student-{run.id}", "model", folder)
        )

    def within(self, patience_s: float, what: str, where: Path, act: Callable[[Any], None]) -> bool:
        """Let `act` do with the run what may take long or fail, in a thread that is left to itself when the time is up.

        Args:
            patience_s: seconds that it may take.
            what: it is, for the line on stderr where wandb does not take it.
            where: it lies on disk, for the same.
            act: is given wandb's run.

        Returns:
            Whether it was done.
        """
        if self._lost:
            return False
        outcome = ["the time is up"]

        def run() -> None:
            try:
                act(self.experiment)
                outcome.append("")
            except Exception as error:
                outcome.append(_first_line(error))

        thread = Thread(target=run, daemon=True)  # some of it knows no time-out
        thread.start()
        thread.join(patience_s)
        if outcome[-1]:
            _say(f"WANDB DID NOT TAKE {what}: {outcome[-1]}. It is in {where}")
        return not outcome[-1]

    def _attempt(self, log: Callable[..., None], *args: Any) -> None:
        if self._lost:
            return
        try:
            log(*args)
        except Exception as error:
            self._lost = True
            where = self.experiment.settings.sync_dir
            _say(f"WANDB HAS STOPPED: {_first_line(error)}. What came before is on disk; upload it with: wandb sync {where}")


def _log_artifact(run: Any, name: str, kind: str, folder: Path) -> None:
    """Upload a folder, and wait for it."""
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    artifact.add_dir(str(folder), policy="immutable", skip_cache=True)  # else wandb copies the files twice
    upload(run, artifact)


def upload(run: Any, artifact: Any) -> None:
    """Log an artifact, and wait until the server has it; offline it is part of what `wandb sync` uploads."""
    logged = run.log_artifact(artifact)
    if not run.offline:
        logged.wait()


def _start(options: dict[str, Any], start_timeout_s: float, finish_timeout_s: float) -> Any:
    folder = Path(options["dir"])
    folder.mkdir(parents=True, exist_ok=True)  # else wandb silently writes to the system's temporary folder
    # its telemetry holds up the exit for 20 seconds where a firewall swallows packets; read when wandb starts
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # not above: it takes a second, and most commands never log

    # quiet and no viewer: otherwise wandb asks the server who is logged in, outside of init_timeout
    settings = wandb.Settings(init_timeout=start_timeout_s, finish_timeout=finish_timeout_s, finish_timeout_raises=True, quiet=True)
    options = options | {"id": _run_id(folder), "settings": settings, "resume": "allow", "reinit": "finish_previous"}
    try:
        online = wandb.setup(wandb.Settings(x_disable_viewer=True)).settings.mode in ("online", "run", "shared")
        if not online or wandb.login(prompt=False, verify=False):
            return wandb.init(**options)
        cause = "no API key (set WANDB_API_KEY or run `wandb login`)"
    except Exception as error:  # whatever it is, training goes on
        cause = _first_line(error)
        with contextlib.suppress(Exception, SystemExit):  # it exits where wandb's service process has crashed
            wandb.teardown()  # the failed start holds its run id until then
    try:
        run = wandb.init(**options, mode="offline")
    except Exception as error:
        _say(f"WANDB IS OFF: {cause}; and offline: {_first_line(error)}. Training goes on without it")
        return None
    _say(f"WANDB IS OFFLINE: {cause}. The metrics are on disk; upload them with: wandb sync {run.settings.sync_dir}")
    return run


def _run_id(folder: Path) -> str:
    """Give the id that the folder's run has on the server; written before the start, for a job that is killed in it."""
    file = folder / "wandb_id"
    if file.is_file() and (kept := file.read_text(encoding="utf-8").strip()):
        return kept
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(run_id, encoding="utf-8")
    beside.replace(file)
    return run_id


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
