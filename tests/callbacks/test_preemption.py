"""A signal ends training at the same step on all ranks, with a checkpoint, and the same command line goes on from it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from distill import checkpoints, signals
from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.callbacks.metrics import JsonlLogger
from distill.callbacks.preemption import Preemption
from distill.cli import main
from tests import pair
from tests.callbacks.tiny import Tiny, loader
from tests.callbacks.tiny import trainer as tiny_trainer
from tests.ranks import run_ranks
from tests.test_command import config
from tests.test_signals import wait_for
from tests.test_slurm import calls, fake

ROOT = Path(__file__).parents[2]


@pytest.fixture
def noted() -> Iterator[None]:
    with signals.noted():
        yield


def send(number: int) -> None:
    """A signal to this process, and the moment until it is noted."""
    os.kill(os.getpid(), number)
    wait_for(signals.received)


def at(count: int, number: int = signal.SIGUSR1) -> Callable[[], None]:
    """A signal in the midst of the `count`-th call."""
    called: list[int] = []

    def call() -> None:
        called.append(1)
        if len(called) == count:
            send(number)

    return call


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    given = {"max_steps": 7, "max_epochs": -1, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]} | options
    return tiny_trainer(*callbacks, Checkpoints(folder / "checkpoints", every=100), Preemption(folder), **given)


def test_after_a_signal_the_step_is_ended_saved_and_logged(noted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, logger=[JsonlLogger(tmp_path)])
    with pytest.raises(signals.Stopped) as stopped:
        made.fit(Tiny(at(3)), loader())
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert made.global_step == 3
    assert checkpoints.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000003.ckpt"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    said = f"Stopped by SIGUSR1 at step 3; saved {tmp_path}/checkpoints/step-00000003.ckpt. Go on from the last checkpoint with --config"
    assert said in capsys.readouterr().err


def test_an_accumulation_window_is_ended_first(noted: None, tmp_path: Path) -> None:
    made, stop, micro_batches = trainer(tmp_path, accumulate_grad_batches=4), at(5), []
    with pytest.raises(signals.Stopped):
        made.fit(Tiny(lambda: (micro_batches.append(1), stop())), loader())
    assert (made.global_step, len(micro_batches)) == (2, 8)


def test_in_training_the_handlers_are_ours(noted: None, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in signals.NOTED]
    seen: list[Any] = []
    made = trainer(tmp_path, max_steps=2)
    made.fit(Tiny(lambda: seen.append([signal.getsignal(number) for number in signals.NOTED])), loader())
    assert seen == [handlers] * 2
    assert [signal.getsignal(number) for number in signals.NOTED] == handlers


def test_lightnings_own_handler_would_not_save(noted: None, tmp_path: Path) -> None:
    """Why it is kept out, and that the private names by which it is are still Lightning's."""
    made = tiny_trainer(enable_checkpointing=False, max_steps=7)
    with pytest.raises(SystemExit) as stopped:
        made.fit(Tiny(at(2, signal.SIGTERM)), loader())
    assert type(stopped.value).__name__ == "SIGTERMException"
    assert callable(made._signal_connector.register_signal_handlers)
    assert callable(made.fit_loop.epoch_loop._broadcast_sigterm_tensor)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_slurm_job_is_requeued_after_the_checkpoint(
    noted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    # the stand-in for scontrol notes whether the checkpoint was there when it was called
    log = fake(tmp_path, monkeypatch, answer=f"ls {tmp_path}/checkpoints/latest >>{tmp_path}/calls")
    with pytest.raises(signals.Stopped) as stopped:
        trainer(tmp_path).fit(Tiny(at(2, number)), loader())
    assert stopped.value.code == status
    assert calls(log) == ["show job --oneliner 12", "requeue 12", f"{tmp_path}/checkpoints/latest"]
    assert "Slurm's job 12 is back in the queue" in capsys.readouterr().err


def test_after_ctrl_c_it_is_not(noted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake(tmp_path, monkeypatch)
    with pytest.raises(signals.Stopped) as stopped:
        trainer(tmp_path).fit(Tiny(at(2, signal.SIGINT)), loader())
    assert stopped.value.code == 130
    assert not log.exists()


def test_before_the_first_step_there_is_nothing_to_save(noted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    send(signal.SIGTERM)
    model = Tiny(lambda: pytest.fail("it trained"))
    with pytest.raises(signals.Stopped):
        trainer(tmp_path).fit(model, loader())
    assert not (tmp_path / "checkpoints").exists()
    said = "Stopped by SIGTERM at step 0; nothing was learned since the last checkpoint. No checkpoint was saved yet."
    assert said in capsys.readouterr().err


def test_without_checkpoints_it_stops_all_the_same(noted: None, tmp_path: Path) -> None:
    made = tiny_trainer(Preemption(tmp_path), max_steps=7)
    with pytest.raises(signals.Stopped):
        made.fit(Tiny(at(2)), loader())
    assert made.global_step == 2


def test_the_last_step_is_no_exception(noted: None, tmp_path: Path) -> None:
    """Measuring and exporting come after it, and may take longer than is left."""

    class Ends(pl.Callback):
        def on_fit_end(self, *args: Any) -> None:
            pytest.fail("it went on to the end")

    with pytest.raises(signals.Stopped):
        trainer(tmp_path, Ends(), max_steps=4, limit_val_batches=0).fit(Tiny(at(4)), loader())
    assert checkpoints.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000004.ckpt"


@pytest.mark.parametrize("every", [100, 2], ids=["not saved yet", "this step is saved already"])
def test_a_validation_is_cut_short_and_begun_anew(noted: None, tmp_path: Path, every: int) -> None:
    """Stopped in the second of three validation batches after step 2, the run ends with the weights and figures of one that never was."""
    whole = run_with_validation(tmp_path / "whole", None, every)
    with pytest.raises(signals.Stopped):
        run_with_validation(tmp_path / "cut", None, every, stop_in_batch=5)
    saved = checkpoints.latest(tmp_path / "cut" / "checkpoints")
    assert saved is not None
    assert saved.name == "step-00000004.ckpt"
    with signals.noted():
        gone_on = run_with_validation(tmp_path / "cut", saved, every)
    assert all(torch.equal(gone_on[name], whole[name]) for name in whole)
    figures = [logged(tmp_path / name) for name in ("whole", "cut")]
    assert [[step for step, names in lines if "val/loss" in names] for lines in figures] == [[1, 3, 5]] * 2
    assert figures[0] == figures[1]


def run_with_validation(folder: Path, path: Path | None, every: int, stop_in_batch: int = 0) -> dict[str, torch.Tensor]:
    class Stops(pl.Callback):
        batches = 0

        def on_validation_batch_start(self, *args: Any) -> None:
            self.batches += 1
            if self.batches == stop_in_batch:
                send(signal.SIGUSR1)

    options: dict[str, Any] = {"max_steps": 6, "limit_val_batches": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}
    made = pair.trainer(
        callbacks=[Stops(), Checkpoints(folder / "checkpoints", every=every), Preemption(folder)],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
        logger=[JsonlLogger(folder)],
        **options,
    )
    folder.mkdir(exist_ok=True)
    pl.seed_everything(0, verbose=False)
    data = pair.data(folder, batch_size=2)  # which makes the teacher's folder, from a fixed seed
    module = pair.module(folder)
    made.fit(module, datamodule=data, ckpt_path=path)
    return {name: value.clone() for name, value in module.state_dict().items()}


def logged(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), {k: v for k, v in line.items() if k not in ("time", "epoch")}) for line in lines]


def on_two_ranks(folder: str) -> dict[str, Any]:
    """Only rank 1 gets a signal, and rank 0 is a step's length ahead of it when it comes."""
    rank = int(os.environ["RANK"])
    stop = at(3, signal.SIGTERM)

    def step() -> None:
        if rank == 1:
            time.sleep(0.2)
            stop()

    options: dict[str, Any] = {"max_steps": 50, "max_epochs": -1, "plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    made = tiny_trainer(Checkpoints(Path(folder), every=100), Preemption(Path(folder)), devices=2, strategy="ddp", **options)
    with signals.noted():
        try:
            made.fit(Tiny(step), loader())
        except signals.Stopped as stopped:
            return {"step": made.global_step, "code": stopped.code, "received": signals.received()}
    return {}


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step_whichever_got_the_signal(tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, 2, str(tmp_path))
    assert (first["received"], second["received"]) == (0, signal.SIGTERM)
    assert (first["step"], first["code"]) == (3, 143)
    assert (second["step"], second["code"]) == (3, 0)  # rank 0 speaks for all
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000003.ckpt"


# ---- the whole command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher, data, and `kd.yaml` that pairs them; outside of any job."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_NTASKS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config()))
    return tmp_path


STOPS = '''
import os, signal, time
import pytorch_lightning as pl
from distill import signals

class Stops(pl.Callback):
    """Sends SIGUSR1 in step 3 of the first run."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3 and "SLURM_RESTART_COUNT" not in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not signals.received():
                time.sleep(0.01)
'''


@pytest.mark.parametrize("name", [[], ["--name", "mine"]])
def test_the_same_command_line_goes_on_after_a_requeue(here: Path, monkeypatch: pytest.MonkeyPatch, name: list[str]) -> None:
    fake(here, monkeypatch)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "stops", raising=False)
    (here / "stops.py").write_text(STOPS)
    command = ["--config", "kd.yaml", "--trainer.callbacks=stops.Stops", "--save_every=100", "--trainer.log_every_n_steps=1", *name]
    assert main(command) == 138
    run = here / "runs" / (name[1] if name else "kd-12")
    assert not (run / "student").exists()
    assert main(command) == 2, "without a restart the folder is refused"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(command) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(6))
    assert json.loads((run / "report.json").read_text())["steps"] == 6


def test_one_stopped_before_its_first_checkpoint_starts_anew(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (here / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (here / "runs" / "mine" / "config.yaml").write_text("")
    assert main(["--config", "kd.yaml", "--name", "mine"]) == 0
    assert json.loads((here / "runs/mine/report.json").read_text())["steps"] == 6


def test_a_run_from_anothers_checkpoint_goes_on_from_its_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--config", "kd.yaml", "--name", "other", "--trainer.max_steps=2"]) == 0
    command = ["--config", "kd.yaml", "--name", "mine", "--ckpt_path=runs/other/checkpoints/step-00000002.ckpt"]
    assert main([*command, "--trainer.max_steps=4"]) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*command, "--trainer.max_steps=6", "--trainer.log_every_n_steps=1"]) == 0
    steps = [json.loads(line)["step"] for line in (here / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "from step 4, not again from step 2"


@pytest.mark.slow
def test_a_signal_during_the_imports_is_honoured_after_them(here: Path) -> None:
    number = signal.SIGUSR1
    command = [sys.executable, str(ROOT / "train.py"), "--config", "kd.yaml", "--name", "a"]
    process = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: caught(process.pid, number))
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 128 + number, error
    assert f"Stopped by {number.name} at step 0; nothing was learned since the last checkpoint. No checkpoint was saved yet." in error
    assert "Traceback" not in error
    assert not (here / "runs").exists()


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; until then it would die of it."""
    [mask] = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (number - 1) & 1)
