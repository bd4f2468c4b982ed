"""Devices, nodes and the cluster environment of a Slurm job; the variables are those that srun of Slurm 22.05 sets."""

from typing import Any

import pytest
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from distill.cluster import settle
from distill.types import ConfigError
from tests import pair

DEFAULTS: dict[str, Any] = {"devices": "auto", "num_nodes": 1, "plugins": []}
OF_TORCHRUN = ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)


def step(monkeypatch: pytest.MonkeyPatch, tasks: int, nodes: int, name: str = "distill") -> None:
    values = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NAME": name,
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(tasks * nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks) if nodes == 1 else f"{tasks}(x{nodes})",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    # set and taken back by monkeypatch, for `settle` sets it
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", str(tasks))


def test_outside_of_slurm_nothing_changes() -> None:
    assert settle(DEFAULTS) == DEFAULTS


@pytest.mark.parametrize("name", ["distill", "bash", "interactive"])
def test_what_was_left_out_is_what_srun_has_started(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    step(monkeypatch, tasks=2, nodes=4, name=name)
    settled = settle(DEFAULTS)
    assert (settled["devices"], settled["num_nodes"]) == (2, 4)
    [environment] = settled["plugins"]
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert environment.world_size() == 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"devices": 1}, "trainer.devices is 1, but Slurm has started 2 tasks on each node; set trainer.devices=2"),
        ({"devices": [0, 1, 2]}, "trainer.devices is 3, but Slurm has started 2 tasks"),
        ({"devices": "0,"}, "trainer.devices is 1, but Slurm has started 2 tasks"),
        ({"devices": "4"}, "trainer.devices is 4, but Slurm has started 2 tasks"),
        ({"devices": 2, "num_nodes": 3}, "trainer.num_nodes is 3, but Slurm has started tasks on 4 nodes; set trainer.num_nodes=4"),
    ],
)
def test_a_mismatch_is_refused_with_both_values(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str) -> None:
    step(monkeypatch, tasks=2, nodes=4)
    with pytest.raises(ConfigError) as error:
        settle(DEFAULTS | given)
    assert said in str(error.value)


@pytest.mark.parametrize("given", [{"devices": 2}, {"devices": "2"}, {"devices": [0, 1]}, {"devices": -1}, {"devices": 2, "num_nodes": 4}])
def test_what_agrees_is_taken(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    step(monkeypatch, tasks=2, nodes=4)
    assert settle(DEFAULTS | given)["num_nodes"] == 4


def test_the_trainer_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    step(monkeypatch, tasks=1, nodes=2)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")  # as with `srun --ntasks`
    settled = settle(DEFAULTS)
    trainer = pair.trainer(**settled)
    assert (trainer.world_size, trainer.num_nodes, trainer.global_rank) == (2, 2, 0)
    trainer.strategy.cluster_environment.validate_settings(num_devices=1, num_nodes=2)  # type: ignore[attr-defined]


def test_a_batch_script_that_forgot_srun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step(monkeypatch, tasks=2, nodes=1)
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(ConfigError, match="Slurm has 2 tasks for this job, but srun has not started this process"):
        settle(DEFAULTS)


@pytest.mark.parametrize("srun", [True, False])
def test_one_process_starts_others_itself(monkeypatch: pytest.MonkeyPatch, srun: bool) -> None:
    step(monkeypatch, tasks=1, nodes=1, name="bash")  # `srun --pty bash`, or a batch script of one task
    if not srun:
        monkeypatch.delenv("SLURM_STEP_ID")
    settled = settle(DEFAULTS | {"devices": 8})
    assert settled["devices"] == 8
    assert isinstance(settled["plugins"][0], LightningEnvironment)


def test_torchrun_and_an_environment_of_ones_own_have_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    step(monkeypatch, tasks=1, nodes=2)
    mine = DEFAULTS | {"devices": 8, "plugins": [LightningEnvironment()]}
    assert settle(mine) == mine
    for name in OF_TORCHRUN:
        monkeypatch.setenv(name, "1")
    assert TorchElasticEnvironment.detect()
    assert settle(DEFAULTS | {"devices": 8}) == DEFAULTS | {"devices": 8}
