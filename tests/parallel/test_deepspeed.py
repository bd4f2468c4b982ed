"""What is mended of DeepSpeed and of Lightning's strategy, each with a test that breaks where the mending does."""

from datetime import timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill.module import DistillModule
from distill.parallel import zero as room
from distill.parallel.deepspeed import DeepSpeed, DeepSpeedCPU
from distill.parallel.weights import whole_state_dict
from distill.parallel.zero import check_installed, without_shm
from distill.students.load import Pretrained
from distill.types import ConfigError
from tests import pair
from tests.parallel import runs
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    pair.data(folder, batch_size=2)
    return folder


# ---- refused before anything starts


def test_no_deepspeed_or_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(room, "version", missing)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'deepspeed>=0.19.8'"):
        DeepSpeedCPU()
    monkeypatch.setattr(room, "version", lambda name: "0.19.7")
    with pytest.raises(ConfigError, match=r"needs DeepSpeed 0.19.8 or newer, found 0.19.7"):
        check_installed()
    monkeypatch.setattr(room, "version", lambda name: "0.20.0")
    check_installed()


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (DeepSpeedCPU, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clips by the global norm alone"),
        (DeepSpeedCPU, {"precision": "16-mixed"}, "precision is 16-mixed, which CPUs do not have; take bf16-mixed"),
        (DeepSpeed, {}, "accelerator is CPUAccelerator, but DeepSpeed was started for GPUs"),
    ],
)
def test_settings_that_cannot_work(cls: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    pair.data(tmp_path, batch_size=2)
    module, trainer = pair.module(tmp_path), pair.trainer(strategy=cls(stage=2), max_steps=1, **settings)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(module, datamodule=pair.data(tmp_path, batch_size=2))


# ---- the start


class Start(pair.pl.Callback):
    """Looks at what training starts from."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        student = pl_module.student
        self.weights = whole_state_dict(trainer, student)
        self.tied = student.lm_head.weight is student.model.embed_tokens.weight
        self.left = sum(p.numel() for p in student.parameters())


class Started(NamedTuple):
    on_the_device: int
    largest: int
    weights: dict[str, torch.Tensor]
    built: dict[str, torch.Tensor]
    tied: bool
    not_partitioned: int
    waits: set[float]


def started(folder: Path, pretrained: bool) -> Started:
    from torch.distributed import distributed_c10d as c10d

    module, start = runs.rich(folder), Start()
    if pretrained:
        module.recipe_of_student = Pretrained(str(folder / "teacher"))
    strategy = runs.strategy("ZeRO-3")
    strategy._timeout = timedelta(seconds=77)
    pair.pl.seed_everything(1, verbose=False)
    on_the_device = watched()
    trainer = pair.trainer(strategy=strategy, devices=2, max_steps=1, callbacks=[start])
    trainer.fit(module, datamodule=pair.data(folder, batch_size=2, seed=1))
    waits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in c10d._world.pg_map}
    torch.manual_seed(1)
    built = module.recipe_of_student.build(module.task, module.expected, module.data.tokenizer, torch.float32)
    largest = max(p.numel() for p in built.parameters())
    return Started(max(on_the_device), largest, start.weights, built.state_dict(), start.tied, start.left, waits)


def watched() -> list[int]:
    """Weights that are whole on the device: whenever DeepSpeed is about to cut one up, and when its engine moves the model there."""
    import deepspeed

    found: list[int] = []
    moved: list[Any] = []
    cut, initialize = deepspeed.zero.Init._zero_init_param, deepspeed.initialize

    def about_to_cut(self: Any, parameter: Any) -> None:
        moved.append(parameter)
        found.append(sum(each.numel() for each in moved))
        cut(self, parameter)

    def about_to_move(*args: Any, model: Any, **kwargs: Any) -> Any:
        found.append(sum(each.numel() for each in model.parameters()))
        return initialize(*args, model=model, **kwargs)

    deepspeed.zero.Init._zero_init_param, deepspeed.initialize = about_to_cut, about_to_move
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_zero_3_starts_from_the_weights_that_were_built_and_waits_as_long_as_it_was_told(pretrained: bool, folder: Path) -> None:
    one, two = run_ranks(started, 2, folder, pretrained)
    assert one.on_the_device <= max(one.largest, 24 * 16), "one weight at a time; the largest may be a projector's"
    assert runs.same(one.weights, one.built)
    assert runs.same(one.weights, two.built)
    assert one.tied
    assert two.tied
    assert one.not_partitioned == two.not_partitioned == 0
    assert one.waits == two.waits == {77.0}


# ---- accumulation for an offloaded optimizer


def stepped(stage: int, offload: bool, steps: int, managed: bool) -> list[torch.Tensor]:
    """Two optimizer steps of two micro-batches, with DeepSpeed's own engine; the window's end told by us or counted by it."""
    import deepspeed

    without_shm()
    deepspeed.init_distributed("gloo", verbose=False)
    rank = deepspeed.comm.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    zero: dict[str, Any] = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
    }
    config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    x = torch.randn(2, 2, 2, 4, 5, generator=torch.Generator().manual_seed(1))  # steps, micro-batches, ranks
    for step in range(2):
        for micro in range(2):
            if not managed:
                engine.set_gradient_accumulation_boundary(micro == 1)
            engine.backward(engine(x[step, micro, rank]).square().mean(), scale_wrt_gas=False)
            if managed or micro == 1:
                engine.step()
    return [p.detach().clone() for p in model.parameters()]


def by_hand() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 2, 2, 4, 5, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        sum(model(x[step, micro, rank]).square().mean() / 2 for micro in range(2) for rank in range(2)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def all_ways() -> dict[str, list[torch.Tensor]]:
    found = {}
    for stage in (1, 2):
        found[f"ZeRO-{stage}, PR 7967"] = stepped(stage, True, steps=2, managed=True)
        found[f"ZeRO-{stage}, PR 7981"] = stepped(stage, True, steps=1, managed=False)
        found[f"ZeRO-{stage}, not offloaded"] = stepped(stage, False, steps=2, managed=False)
    return found


def test_no_micro_batch_is_lost_for_an_offloaded_optimizer() -> None:
    expected = by_hand()
    for ways in run_ranks(all_ways, 2):
        for name, weights in ways.items():
            for weight, right in zip(weights, expected, strict=True):
                torch.testing.assert_close(weight, right, msg=lambda text, name=name: f"{name}: {text}")


# ---- gradients that are not finite


class Poisoned(DistillModule):
    """Whose gradient is NaN on rank 1 alone, in the first micro-batch of the second step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 2 and self.global_rank == 1 else loss


class Watch(pair.pl.Callback):
    """Keeps all that a step may change: weights, and the optimizer's own copies and state."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            weights = whole_state_dict(trainer, pl_module)
            inner = trainer.strategy.deepspeed_engine.optimizer.optimizer.state.values()
            self.states.append([*weights.values(), *(v.clone() for state in inner for v in state.values() if isinstance(v, torch.Tensor))])
            self.norms.append(trainer.strategy.gradient_norm())


def poisoned(folder: Path, spec: str) -> list[tuple[list[bool], list[bool]]]:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module, watch = runs.rich(folder), Watch()
        module.__class__ = Poisoned
        trainer = runs.trainer(spec, 2, max_steps=3, callbacks=[watch], precision=precision)
        trainer.fit(module, datamodule=pair.data(folder, batch_size=2, seed=1))
        pairs = zip(watch.states, watch.states[1:], strict=False)
        changed = [not all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for one, other in pairs]
        finite = [bool(torch.tensor(watch.norms[i]).isfinite()) for i in range(3)]
        fine = all(bool(t.isfinite().all()) for t in watch.states[-1])
        found.append((changed, [*finite, fine]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_nan_in_one_gradient_of_one_rank_skips_the_step_on_all(spec: str, folder: Path) -> None:
    for rank in run_ranks(poisoned, 2, folder, spec):
        assert rank == [([False, True], [True, False, True, True])] * 2


@pytest.mark.parametrize("given", [{"stage": 0}, {"config": {"zero_optimization": {"stage": 0}}}, {"config": {"steps_per_print": 1}}])
def test_deepspeed_without_a_stage_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no zero_optimization\.stage of 1, 2 or 3 here; without one, take trainer\.strategy=ddp"):
        DeepSpeedCPU(**given)
