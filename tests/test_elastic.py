"""torchrun starts a job again in which a rank was killed, and training goes on from the newest checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import pair
from tests.test_command import config

ROOT = Path(__file__).parents[1]
KILLER = """
import os, pathlib, signal
import pytorch_lightning as pl

class Killer(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 5 and not os.path.exists("killed"):
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def train(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), "--config", "kd.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", *args]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    (tmp_path / "killer.py").write_text(KILLER)
    given = config()
    given["trainer"] |= {"max_steps": 8, "log_every_n_steps": 1, "callbacks": [{"class_path": "killer.Killer"}]}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(given))
    done = train(tmp_path, "--name=a")
    assert done.returncode == 0, done.stderr[-5000:]
    run = tmp_path / "runs" / "a"
    assert json.loads((run / "report.json").read_text())["steps"] == 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 7], "from the checkpoint of step 4 on"
    assert lines[4]["train/loss"] == lines[5]["train/loss"], "the step that was repeated is the same, to the bit"
    assert "error: rank 1 on" in done.stderr
