"""Running out of memory is answered with what to turn down."""

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from distill.callbacks.memory import OutOfMemory, explain, is_out_of_memory, smaller, used
from distill.cli import main
from tests import pair
from tests.test_command import config

LOSS = """
import torch
from distill.losses.base import TokenLoss

class Hungry(TokenLoss):
    def forward(self, student, teacher, labels_N):
        {}
"""
REAL = "torch.empty(2**55, dtype=torch.uint8)"
SIMULATED = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nmore')"


def error_of(expression: str) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        exec(expression, {"torch": torch})
    return caught.value


@pytest.mark.parametrize(
    ("expression", "whether"),
    [
        (REAL, True),
        (SIMULATED, True),
        ("raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)')", True),
        ("bytearray(2**62)", True),
        ("torch.ones(2) @ torch.ones(3)", False),
        ("raise RuntimeError('CUDA error: device-side assert triggered')", False),
    ],
)
def test_which_errors_it_is(expression: str, whether: bool) -> None:
    assert is_out_of_memory(error_of(expression)) == whether
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "said"),
    [
        (8, 4, "data.batch_size=4 with trainer.accumulate_grad_batches=8 (now 8 and 4; the global batch stays); then "),
        (3, 2, "data.batch_size=1 with trainer.accumulate_grad_batches=6 (now 3 and 2; the global batch stays); then "),
        (1, 4, ""),
    ],
)
def test_the_global_batch_stays(batch_size: int, accumulate: int, said: str) -> None:
    assert smaller(batch_size, accumulate) == said
    if said:
        half, more = map(int, re.findall(r"=(\d+)", said))
        assert half * more == batch_size * accumulate


def test_used_memory_of_this_process() -> None:
    found = re.fullmatch(r"([\d.]+) of ([\d.]+) GB in use at the peak", used(torch.device("cpu")).replace(" GB of", " of"))
    assert found
    (total,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert float(found[2]) == pytest.approx(int(total) * 1024 / 1e9, abs=0.01)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert float(found[1]) == pytest.approx(int(peak) * 1024 / 1e9, rel=0.05)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    assert os.sysconf("SC_PHYS_PAGES") > 0


@pytest.mark.parametrize("statement", [REAL, SIMULATED])
@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_the_command_says_it_in_one_line(
    statement: str, dry_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "hungry", raising=False)
    (tmp_path / "hungry.py").write_text(LOSS.format(statement))
    pair.teacher_folder(tmp_path / "teacher")
    pair.prompts(tmp_path / "prompts.jsonl", 80)
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config()))
    given = ["--name=a", "--model.losses.mine=hungry.Hungry", "--trainer.accumulate_grad_batches=2", f"--dry_run={dry_run}"]
    assert main(["fit", "--config", "kd.yaml", *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory on cpu at step 0: ")
    assert " GB in use at the peak. Estimated: sum " in line
    order = ["data.batch_size=2 with trainer.accumulate_grad_batches=4", "gradient_checkpointing=true", "model.chunk", "zero1"]
    assert sorted(order, key=line.index) == order
    assert line.endswith(
        "torch said: CUDA out of memory. Tried to allocate 2.00 GiB." if statement == SIMULATED else "(Cannot allocate memory)"
    )


class Bare(pl.LightningModule):
    """Runs out of memory before there is anything to estimate, or after."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.layer = where, torch.nn.Linear(1, 1)

    def setup(self, stage: str) -> None:
        self._at("setup")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._at("training_step")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())

    def _at(self, where: str) -> None:
        if where == self.where:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("where", "estimated"), [("setup", False), ("training_step", True)])
@pytest.mark.parametrize("works", [True, False])
def test_an_estimate_only_where_there_can_be_one(where: str, estimated: bool, works: bool, tmp_path: Path) -> None:
    def estimate(module: Any) -> dict[str, float]:
        assert works
        return {"small": 1e9, "large": 2.5e9, "(not shown)": 9e9}

    with pytest.raises(torch.OutOfMemoryError) as caught:
        pair.trainer(max_steps=1, callbacks=[OutOfMemory(estimate)]).fit(Bare(where), pair.data(tmp_path))
    said = explain(caught.value)
    assert ("Estimated: large 2.50 GB, small 1.00 GB. What helps" in said) == (estimated and works)
    assert "not shown" not in said
    assert said.endswith("torch said: CUDA out of memory")


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    error = RuntimeError("of another kind")
    OutOfMemory(lambda module: {}).on_exception(pair.trainer(), pl.LightningModule(), error)
    assert not hasattr(error, "__notes__")


def test_what_the_callback_did_not_see() -> None:
    said = explain(torch.OutOfMemoryError("CUDA out of memory"))
    assert said == "out of memory. Lower data.val_batch_size or model.chunk. torch said: CUDA out of memory"
