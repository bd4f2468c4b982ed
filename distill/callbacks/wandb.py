"""Weights & Biases that can neither stop nor hang a run."""

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.utilities import rank_zero_only


def wandb_logger(
    project: str, name: str, folder: str | Path, config: dict[str, Any], run_id: str | None = None, timeout_s: float = 20
) -> Logger:
    """Start a run: online if there is a key and the server answers in time, else offline, with a line on stderr that says why.

    `WANDB_MODE=offline` and `disabled`, and `wandb offline`, are obeyed. A key is never asked for: a prompt would hang a batch job.
    An upload that is not finished `3 · timeout_s` after the end of training is given up; all of it is on disk, for `wandb sync`.

    Args:
        project: project on the server.
        name: the run's name there.
        folder: the run's folder; wandb writes to `folder/wandb`.
        config: shown on the server beside the run.
        run_id: of an earlier run, to go on with it.
        timeout_s: seconds the server has to answer at the start.

    Returns:
        On rank zero Lightning's logger of the run; on other ranks, and where wandb cannot start at all, one that does nothing.
    """
    options = {"project": project, "name": name, "dir": str(folder), "config": config, "id": run_id}
    run = rank_zero_only(_start)(options, timeout_s)
    if run is None:
        return DummyLogger()
    # what WandbLogger does for a run of its own making: optimizer steps on the x axis
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return _Logger(project=project, save_dir=str(folder), experiment=run)


class _Logger(WandbLogger):
    """Lightning's logger, for which a crash of wandb's service process is no reason to end training."""

    _lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._attempt(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self._attempt(super().log_hyperparams, params)

    def _attempt(self, log: Callable[..., None], *args: Any) -> None:
        if self._lost:
            return
        try:
            log(*args)
        except Exception as error:
            self._lost = True
            where = self.experiment.settings.sync_dir
            _say(f"WANDB HAS STOPPED: {_first_line(error)}. What came before is on disk; upload it with: wandb sync {where}")


def _start(options: dict[str, Any], timeout_s: float) -> Any:
    Path(options["dir"]).mkdir(parents=True, exist_ok=True)  # else wandb silently writes to the system's temporary folder
    # its telemetry holds up the exit for 20 seconds where a firewall swallows packets; read when wandb starts
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # not above: it takes a second, and most commands never log

    # quiet and no viewer: otherwise wandb asks the server who is logged in, outside of init_timeout
    settings = wandb.Settings(init_timeout=timeout_s, finish_timeout=3 * timeout_s, quiet=True)
    options = options | {"settings": settings, "resume": "allow", "reinit": "finish_previous"}
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


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
