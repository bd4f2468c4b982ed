"""The README: its example runs, its table is the one that was measured, and every config stands in it."""

import json
import re
from pathlib import Path

import pytest

from tests.test_command import fit, here

__all__ = ["here"]
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_loss_runs_as_written(here: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Mine" in block)
    assert len(code.splitlines()) <= 25
    (here / "my_losses.py").write_text(code)
    command = next(line for line in README.splitlines() if "my_losses.Mine" in line)
    balanced = ["--model.balancer=GradNorm", "--model.balancer.shares={ce: 0.3, kd: 0.7}"]  # as in kd_llama.yaml
    assert fit("--name", "a", *balanced, *command.split()[4:]) == 0
    lines = [json.loads(line) for line in (here / "runs/a/metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "train/loss" in line)
    weighted = line["train/ce_weighted"] + line["train/kd_weighted"]
    assert line["train/loss"] == pytest.approx(weighted + line["train/mine_weight"] * line["train/mine"], rel=1e-4)
    assert line["train/mine_weight"] > 0


def test_the_table_is_the_measured_one() -> None:
    table = re.search(r"<!-- demo -->\n(.*?)\n<!-- /demo -->", README, re.DOTALL)
    assert table is not None
    assert table[1] in (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    assert table[1].count("|") > 20


def test_every_config_is_explained_and_every_link_leads_somewhere() -> None:
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"`{config.name}`" in README
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
