import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.callbacks.pruning import Pruning
from distill.callbacks.soft_movement import SoftMovementPruning
from distill.compress.mask import MovementMask, masks_of, parametrizations
from distill.module import DistillModule
from distill.report import student as report
from distill.students.load import FromConfig
from distill.tasks import CausalLM
from distill.types import ConfigError
from tests import models, pair
from tests.compress.test_mask import Round
from tests.parallel import runs

STEPS = 12
GROUPED = pair.STUDENT | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def fit(folder: Path, *callbacks: pl.Callback, module: DistillModule | None = None, ckpt: Path | None = None, **kwargs: Any) -> pl.Trainer:
    """Train the pair with two layers on global batches of 4."""
    warnings.filterwarnings("ignore")
    module = module or pair.module(folder, student=FromConfig(GROUPED))
    trainer = pair.trainer(**{"max_steps": STEPS, "callbacks": list(callbacks), "log_every_n_steps": 1} | kwargs)
    trainer.fit(module, pair.data(folder, batch_size=4), ckpt_path=ckpt, weights_only=False)
    return trainer


def student_of(trainer: pl.Trainer) -> PreTrainedModel:
    return cast(PreTrainedModel, cast(DistillModule, trainer.lightning_module).student)


def pruned(**kwargs: Any) -> Pruning:
    return Pruning(**{"sparsity": 0.75, "begin": 0.25, "end": 0.75, "every": 2} | kwargs)


class Watch(pl.Callback):
    """Keeps the masks and weights at the end of each step, and what was logged."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.logged: list[float] = []
        self.masks: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        found = masks_of(student_of(trainer), self.pruning.pruner.owner)
        self.masks.append({name: mask.mask.clone() for name, (_, mask) in found.items()})
        self.weights.append({name: parametrizations(module).original.detach().clone() for name, (module, _) in found.items()})
        self.logged.append(float(trainer.callback_metrics["train/sparsity"]))


def test_the_mask_follows_the_schedule_and_the_weights_at_the_start_of_the_step(tmp_path: Path) -> None:
    pruning = pruned(scope="global")
    watch = Watch(pruning)
    fit(tmp_path, pruning, watch)
    # 4,608 weights: in each of two layers 16·16 of q and o, 16·8 of k and v, 3·16·32
    # t0 = 3, Δt = 2, end = 9: 0.75 (1 − (1 − p)³) at p = 0, 1/3, 2/3, 1
    wanted = [0, 0, 0, 0, 0, *[0.75 * 19 / 27] * 2, *[0.75 * 26 / 27] * 2, 0.75, 0.75, 0.75]
    assert watch.logged == pytest.approx(wanted, abs=1e-3)
    for step in (5, 7, 9):
        before, mask = watch.weights[step - 1], watch.masks[step]
        kept = torch.cat([before[name].abs()[mask[name]] for name in mask])
        gone = torch.cat([before[name].abs()[~mask[name]] for name in mask])
        assert kept.min() >= gone.max()
    for name, mask in watch.masks[-1].items():
        assert torch.equal(mask, watch.masks[9][name])
    assert pruning.figures() == {"sparsity": pytest.approx(0.75, abs=1e-3), "masked": 3456, "of": 4608, "unit": "weights"}
    assert pruning.summary() == [
        "75% of the weights by magnitude, cubic from 25% to 75% of the steps",
        "masked 3,456 of 4,608 weights",
    ]


@pytest.mark.parametrize("method", ["magnitude", "movement", "displacement", "wanda", "random"])
def test_single_weights_are_zeros_in_the_saved_student_which_computes_the_same(method: Any, tmp_path: Path) -> None:
    pruning, module = pruned(method=method), pair.module(tmp_path, student=FromConfig(GROUPED))
    before: list[str] = []
    module.on_train_start = lambda: before.append(runs.digest(runs.teacher_of(module)))  # type: ignore[method-assign]
    trainer = fit(tmp_path, pruning, module=module, gradient_clip_val=1.0)
    assert before == [runs.digest(runs.teacher_of(module))], "the teacher is not touched"
    assert not any(parametrize.is_parametrized(each) for each in runs.teacher_of(module).modules())
    report.save(trainer, module, tmp_path / "run")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()
    ids = models.tokens(2, 7) % saved.config.vocab_size
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, student_of(trainer).eval()(input_ids=ids).logits)
    linears = [m.weight for m in saved.model.modules() if isinstance(m, nn.Linear)]
    assert sum(int((w == 0).sum()) for w in linears) == 0.75 * sum(w.numel() for w in linears)


@pytest.mark.parametrize(
    ("structure", "key", "value"),
    [
        ("neurons", "intermediate_size", 8),
        ("heads", "num_attention_heads", 2),
        ("kv_groups", "num_key_value_heads", 1),
        ("layers", "num_hidden_layers", 1),
    ],
)
def test_parts_are_taken_out_of_the_saved_student(structure: Any, key: str, value: int, tmp_path: Path) -> None:
    pruning, module = pruned(structure=structure, method="movement"), pair.module(tmp_path, student=FromConfig(GROUPED))
    trainer = fit(tmp_path, pruning, module=module)
    saved = report.save(trainer, module, tmp_path / "run")
    assert saved["parameters"] < module.size["parameters"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()
    assert getattr(again.config, key) == value
    ids = models.tokens(2, 7) % again.config.vocab_size
    with torch.no_grad():
        assert (again(input_ids=ids).logits - student_of(trainer).eval()(input_ids=ids).logits).abs().max() <= 1e-5
    assert pruning.figures()["unit"] == structure


class Stop(pl.Callback):
    def __init__(self, micro_batches: int) -> None:
        self.left = micro_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


@pytest.mark.parametrize(
    "kwargs", [{"method": "movement"}, {"method": "wanda"}, {"method": "wanda", "structure": "neurons"}, {"method": "displacement"}]
)
@pytest.mark.parametrize("stop", [10, 11], ids=["between windows", "within a window"])
def test_resume_is_exact_to_the_bit(kwargs: dict[str, Any], stop: int, tmp_path: Path) -> None:
    whole = fit(tmp_path, pruned(**kwargs), accumulate_grad_batches=2)
    half = fit(tmp_path, pruned(**kwargs), Stop(stop), accumulate_grad_batches=2)
    assert half.global_step == stop // 2, "masks have been set at 3, and are due again at 5"
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = fit(tmp_path, pruned(**kwargs), ckpt=tmp_path / "half.ckpt", accumulate_grad_batches=2)
    assert runs.same(student_of(again).state_dict(), student_of(whole).state_dict())
    assert any(name.endswith("mask") for name in student_of(again).state_dict())


def test_zeros_stay_zeros_under_a_quantiser_that_comes_after(tmp_path: Path) -> None:
    pruning, module = pruned(), pair.module(tmp_path, student=FromConfig(GROUPED))
    prepare = pruning.prepare

    def both(student: PreTrainedModel, task: Any) -> None:
        prepare(student, task)
        for linear, _ in masks_of(student, pruning.pruner.owner).values():
            parametrize.register_parametrization(linear, "weight", Round(), unsafe=True)

    pruning.prepare = both  # type: ignore[method-assign]
    trainer = fit(tmp_path, pruning, module=module)
    for linear, mask in masks_of(student_of(trainer), pruning.pruner.owner).values():
        assert not linear.weight[~mask.mask].any()
        assert torch.equal(linear.weight, (linear.weight * 1024).round() / 1024)
    done = cast(PreTrainedModel, report.whole(trainer, module)[0])
    pruning.finish(done)
    chains = [parametrizations(m) for m in done.modules() if isinstance(m, nn.Linear) and parametrize.is_parametrized(m, "weight")]
    assert [[type(each) for each in chain] for chain in chains] == [[Round]] * 14


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, r"Pruning\.sparsity must be in \[0, 1\), the share that is masked, got 1\.0"),
        ({"sparsity": -0.1}, r"Pruning\.sparsity must be in \[0, 1\)"),
        ({"begin": 0.8, "end": 0.5}, r"Pruning\.end must be from begin \(0\.8\) to 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"structure": "neurons", "exclude": ["*.0.*"]}, "takes as many neurons out of each layer"),
        ({"method": "movement", "schedule": "one_shot", "begin": 0.0}, "movement knows nothing before training"),
        ({"method": "displacement", "schedule": "iterative", "begin": 0.0}, "displacement knows nothing before training"),
    ],
)
def test_bad_values_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pruning(**{"sparsity": 0.5} | kwargs)


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: Pruning\.include: no linear layer is called '\*mpl\*'"):
        Pruning(0.5, include=["*mpl*"]).prepare(models.causal_lm(), CausalLM())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("method", ["movement", "displacement"])
def test_small_steps_are_not_added_up_in_half_precision(method: Any, precision: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"Pruning adds up small steps.*trainer\.precision={precision} rounds away; take bf16-mixed"):
        fit(tmp_path, pruned(method=method), precision=precision, max_steps=1)


def test_magnitudes_are_fine_in_half_precision(tmp_path: Path) -> None:
    fit(tmp_path, pruned(), precision="bf16-true", max_steps=1)


def test_a_share_of_heads_that_takes_none_is_refused() -> None:
    """Of 4 heads 3 do not divide a hidden size of 32."""
    model = models.causal_lm(hidden_size=32, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ConfigError, match=r"Pruning: sparsity 0\.25 takes none of 4 heads out.*take a sparsity of 0\.5, 0\.75"):
        Pruning(0.25, structure="heads").prepare(model, CausalLM())


@pytest.mark.parametrize("method", ["movement", "displacement"])
@pytest.mark.parametrize("schedule", ["one_shot", "iterative"])
def test_nothing_is_pruned_before_there_is_something_to_go_by(method: Any, schedule: Any, tmp_path: Path) -> None:
    """Before the first step all scores are 0, and the first weights would stay because they are first."""
    pruning = Pruning(0.75, method, schedule, begin=0.05, end=0.5, every=1)  # 5 % of 12 steps is none
    watch = Watch(pruning)
    fit(tmp_path, pruning, watch)
    assert all(mask.all() for mask in watch.masks[0].values())
    for mask in watch.masks[1].values():
        kept = mask.flatten().nonzero()
        assert 0 < len(kept) < mask.numel()
        assert int(kept.max()) + 1 > len(kept), "not simply the first"


def test_the_last_mask_is_set_even_where_the_end_is_the_end_of_training(tmp_path: Path) -> None:
    pruning = Pruning(0.5, end=1.0, every=7)
    fit(tmp_path, pruning)
    assert pruning.figures()["sparsity"] == 0.5


def test_several_log_under_numbers(tmp_path: Path) -> None:
    parts = [pruned(include=["*mlp*"]), pruned(include=["*self_attn*"], sparsity=0.25)]
    trainer = fit(tmp_path, *parts)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "sparsity" in name}
    assert logged == {"train/sparsity_1": 0.75, "train/sparsity_2": 0.25}
    for one, other in ((parts[0], "self_attn"), (parts[1], "mlp")):
        assert not any(other in name for name in one.pruner.names(student_of(trainer)))


def test_learned_masks_are_those_of_their_scores_at_every_step(tmp_path: Path) -> None:
    """Top_v(S) is taken in each forward pass, to the end of training; arXiv 2005.07683, section 4."""

    class Follow(pl.Callback):
        moved = 0

        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            found = masks_of(student_of(trainer), pruning.pruner.owner)
            for name, (_, mask) in found.items():
                scores, kept = cast(MovementMask, mask).scores.detach(), mask.mask.flatten()
                if trainer.global_step > 9:  # no longer grows, and moves on
                    self.moved += int((kept != self.last[name]).sum())
                    assert int(kept.sum()) == len(kept) // 4
                if trainer.global_step > 3:
                    assert scores[kept].min() >= scores[~kept].max()
            self.last = {name: mask.mask.flatten().clone() for name, (_, mask) in found.items()}

    pruning, follow = Pruning(0.75, method="movement", begin=0.25, end=0.75), Follow()
    fit(tmp_path, pruning, follow)
    assert follow.moved > 0
    assert SoftMovementPruning().every == 1
    assert Pruning(0.5).every == 10
    assert Pruning(0.5, method="movement", every=3).every == 3
