"""Training through quantisation: from the schedule to the student that is saved, under any strategy, resumed in mid-warm-up."""

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.callbacks.pruning import Pruning
from distill.callbacks.qat import QuantizationAwareTraining
from distill.compress import fake_quant, integers
from distill.compress.select import linears
from distill.compress.structured import remove_layers
from distill.losses.measure import measure
from distill.module import DistillModule
from distill.report import student as report
from distill.students.load import FromConfig, Pretrained
from distill.tasks import CausalLM
from distill.types import ConfigError
from tests import models, pair
from tests.compress.test_fake_quant import base_config
from tests.data.helpers import WORDS
from tests.export.sources import as_torchao
from tests.parallel import runs
from tests.ranks import run_ranks

STEPS = 10
SCHEDULE: dict[str, Any] = {"start": 0.2, "warmup": 4}


def qat(**kwargs: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"scheme": "int3", "group_size": 8} | kwargs)


def fit(folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None, student: Any = None, **kwargs: Any) -> pl.Trainer:
    """Train the pair on global batches of 4."""
    warnings.filterwarnings("ignore")
    module = pair.module(folder, **({"student": student} if student else {}))
    trainer = pair.trainer(**{"max_steps": STEPS, "callbacks": list(callbacks), "log_every_n_steps": 1} | kwargs)
    trainer.fit(module, pair.data(folder, batch_size=4), ckpt_path=ckpt, weights_only=False)
    return trainer


def module_of(trainer: pl.Trainer) -> DistillModule:
    return cast(DistillModule, trainer.lightning_module)


def student_of(trainer: pl.Trainer) -> PreTrainedModel:
    return cast(PreTrainedModel, module_of(trainer).student)


def loss_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Cross-entropy in nats per token."""
    sums = [measure(CausalLM().outputs(model, batch), None, batch["labels"], len(WORDS)) for batch in batches]
    return sum(float(each["loss"]) for each in sums) / sum(float(each["count"]) for each in sums)


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


class Strengths(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[set[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append({each.strength for each in fake_quant.quantisers(student_of(trainer))})


@pytest.mark.parametrize("window", [1, 2])
def test_strength_follows_the_optimizer_steps(window: int, tmp_path: Path) -> None:
    watch = Strengths()
    fit(tmp_path, qat(**SCHEDULE), watch, accumulate_grad_batches=window)
    expected = [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert watch.seen == [{value} for value in expected for _ in range(window)]


@pytest.mark.parametrize(
    ("start", "warmup", "expected"),
    [(0, 0, [1.0] * 4), (0.5, 0, [0.0, 0.0, 1.0, 1.0]), (2, 0, [0.0, 0.0, 1.0, 1.0]), (1, 0.5, [0.0, 0.0, 0.5, 1.0])],
)
def test_shares_and_steps(start: float, warmup: float, expected: list[float]) -> None:
    assert [qat(start=start, warmup=warmup).strength(step, 4) for step in range(4)] == expected


@pytest.mark.parametrize("scheme", ["int2", "int8", "int8-int4", "ternary"])
def test_the_saved_student_is_the_one_that_was_measured(scheme: str, tmp_path: Path) -> None:
    """Stock transformers gives its logits, torchao's integers its loss, and torchao's own quantisation of the trained floats as well."""
    from torchao.quantization import quantize_

    callback = qat(scheme=scheme, group_size=None if scheme in ("int8", "ternary") else 8)
    trainer = fit(tmp_path, callback, max_steps=30)
    module, trained = module_of(trainer), student_of(trainer).eval()
    batches = list(module.data.val_dataloader())
    expected = trained(batches[0]["input_ids"]).logits
    report.save(trainer, module, tmp_path / "run")
    assert torch.equal(trained(batches[0]["input_ids"]).logits, expected), "the student goes on as it is trained"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    how = next(iter(callback.schemes.values()))
    if not how.inputs:
        assert torch.equal(stock(batches[0]["input_ids"]).logits, expected)
    assert integers.recorded(stock) == callback.schemes
    loss = loss_of(trained, batches)
    assert torch.equal(as_torchao(stock)(batches[0]["input_ids"]).logits, expected)
    assert abs(loss_of(stock, batches) - loss) <= 2e-4
    if how.kind == "int":
        floats = module.new_student(torch.float32).eval()
        floats.load_state_dict({_plain(name): value for name, value in trained.state_dict().items() if not name.endswith(".bits")})
        assert abs(loss_of(floats, batches) - loss) > 2e-4 or scheme == "int8", "quantisation costs something, or this says nothing"
        head = floats.get_output_embeddings()  # type: ignore[operator]
        quantize_(floats, base_config(how), filter_fn=lambda layer, _: isinstance(layer, nn.Linear) and layer is not head)
        assert abs(loss_of(floats, batches) - loss) <= 2e-4
        assert torch.equal(floats(batches[0]["input_ids"]).logits, expected)


def _plain(name: str) -> str:
    return name.replace("parametrizations.weight.original", "weight")


@pytest.mark.parametrize(("scheme", "group_size"), [("int4", 8), ("ternary", None)])
def test_in_half_precision_too(scheme: str, group_size: int | None, tmp_path: Path) -> None:
    """Rotary frequencies stay exact, as transformers loads them: the logits that are measured are those of the saved student."""
    trainer = fit(tmp_path, qat(scheme=scheme, group_size=group_size), precision="bf16-true")
    measured, module = student_of(trainer).eval(), module_of(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    report.save(trainer, module, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto").eval()
    assert saved.model.rotary_emb.inv_freq.dtype == measured.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = models.tokens(2, 30) % len(WORDS)
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved(ids).logits, measured(ids).logits)
    again = report.deployed(module, report.trained(module, tmp_path / "a.ckpt"))
    for (name, one), other in zip(saved.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_head_and_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    callback = qat()
    trainer = fit(tmp_path, callback, student=FromConfig(pair.STUDENT | {"tie_word_embeddings": False}), max_steps=2)
    assert len(callback.schemes) == 7
    weights = (student_of(trainer).get_output_embeddings(), student_of(trainer).get_input_embeddings())
    assert all(type(each) in (nn.Linear, nn.Embedding) for each in weights)
    assert callback.summary() == ["int3, groups of 8 · 7 layers · 3.00 bits a weight and the scales"]
    assert callback.figures()["bits_per_weight"] == 3.0


def test_it_goes_on_where_it_was_stopped_in_mid_warm_up(tmp_path: Path) -> None:
    whole = fit(tmp_path, qat(**SCHEDULE))
    half = fit(tmp_path, qat(**SCHEDULE), StopAt(4))
    assert (half.global_step, qat(**SCHEDULE).strength(4, STEPS)) == (4, 0.5)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = fit(tmp_path, qat(**SCHEDULE), ckpt=tmp_path / "half.ckpt")
    assert again.global_step == STEPS
    assert runs.same(student_of(again).state_dict(), student_of(whole).state_dict())
    other = fit(tmp_path, qat(start=0.0), ckpt=tmp_path / "half.ckpt")
    assert not runs.same(student_of(other).state_dict(), student_of(whole).state_dict()), "the schedule matters"


def test_after_a_mask_zeros_stay_and_the_rest_is_quantised(tmp_path: Path) -> None:
    pruning, callback = Pruning(sparsity=0.5, begin=0.1, end=0.5, every=2), qat(scheme="int4")
    trainer = fit(tmp_path, pruning, callback)
    module, trained = module_of(trainer), student_of(trainer).eval()
    batch = next(iter(module.data.val_dataloader()))
    expected = trained(batch["input_ids"]).logits
    report.save(trainer, module, tmp_path / "run")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert torch.equal(stock(batch["input_ids"]).logits, expected)
    zeros = [float((layer.weight == 0).float().mean()) for layer in linears(stock, None, None, "here").values()]
    assert min(zeros) >= 0.45
    assert torch.equal(as_torchao(stock)(batch["input_ids"]).logits, expected)


# ---- bits


def test_bits_by_pattern(tmp_path: Path) -> None:
    callback = qat(scheme="int4", bits={"*q_proj": 8, "*_proj": 3, "*.mlp.*": 2})
    fit(tmp_path, callback, max_steps=1)
    chosen = {name.rpartition(".")[2]: how.bits for name, how in callback.schemes.items()}
    assert chosen == {"q_proj": 8} | dict.fromkeys(["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 3)


def test_a_budget_gives_the_sensitive_layers_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.data(tmp_path)
    teacher = Pretrained(str(tmp_path / "teacher"))
    callback = qat(scheme="int4", budget=3.2, choices=(2, 4, 8))
    trainer = fit(tmp_path, callback, student=teacher, max_steps=2)
    assert 2.0 < callback.average <= 3.2
    assert callback.costs.keys() == callback.schemes.keys()
    for name, costs in callback.costs.items():
        assert costs.keys() == {2, 4, 8}
        assert abs(costs[8]) < abs(costs[2]), name
    module = module_of(trainer)
    floats = cast(Any, module.new_student(torch.float32)).eval()
    data: Any = module.data
    from distill.data.loader import permutation

    batch = data.collator()([data.train_set[int(i)] for i in permutation(len(data.train_set), data.seed, 0)[:16]])
    name = next(iter(callback.costs))
    before = loss_of(floats, [batch])
    layer = floats.get_submodule(name)
    layer.weight.data = fake_quant.weight_quantiser(fake_quant.Scheme("int", 2, 8))(layer.weight.data)
    assert callback.costs[name][2] == pytest.approx(loss_of(floats, [batch]) - before, abs=1e-9), "measured alone"
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setattr("distill.callbacks.qat.costs_alone", None)  # no resume needs it
    other = qat(scheme="int4", budget=3.2, choices=(2, 4, 8))
    again = fit(tmp_path, other, student=teacher, max_steps=3, ckpt=tmp_path / "half.ckpt")
    assert (other.schemes, other.costs) == (callback.schemes, callback.costs)
    found = fake_quant.weights_of(student_of(again), other.owner)
    assert {name: each.how.bits for name, (_, each) in found.items()} == {name: how.bits for name, how in callback.schemes.items()}
    assert len({how.bits for how in other.schemes.values()}) > 1, "or this says nothing"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheme": "int2"}, r"as int, 4 bits, groups of 8, but here it is int, 2 bits, groups of 8"),
        ({"scheme": "ternary"}, r"as int, 4 bits, groups of 8, but here it is ternary, 2 bits, groups of 8"),
        ({"group_size": 16}, r"as int, 4 bits, groups of 8, but here it is int, 4 bits, groups of 16"),
        ({"scheme": "int8-int4"}, r"as int, 4 bits, groups of 8, but here it is int, 4 bits, groups of 8, 8-bit inputs"),
        ({"bits": {"*q_proj": 5}}, r"with 'model\.layers\.0\.self_attn\.q_proj' as int, 4 bits, groups of 8, but here it is int, 5 bits"),
        ({"group_size": 16, "budget": 4.0}, r"as int, 4 bits, groups of 8, but here it is int, 4 bits, groups of 16"),
    ],
)
def test_a_checkpoint_of_another_scheme_is_refused(given: dict[str, Any], said: str, trained: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(trained, qat(**{"scheme": "int4"} | given), ckpt=trained / "int4.ckpt", max_steps=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of the second step, of `int4` in groups of 8."""
    folder = tmp_path_factory.mktemp("int4")
    fit(folder, qat(scheme="int4"), max_steps=2).save_checkpoint(folder / "int4.ckpt")
    return folder


def test_several_for_different_layers_have_a_state_each(tmp_path: Path) -> None:
    pair_of = lambda: (qat(include=["*mlp*"]), qat(include=["*self_attn*"], scheme="int4"))
    fit(tmp_path, *pair_of(), max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
    first, second = pair_of()
    trainer = fit(tmp_path, first, second, max_steps=3, ckpt=tmp_path / "two.ckpt")
    for each in (first, second):
        assert fake_quant.weights_of(student_of(trainer), each.owner).keys() == each.schemes.keys()
    done = report.deployed(module_of(trainer), report.whole(trainer, module_of(trainer))[0])
    assert ({how.bits for how in first.schemes.values()}, {how.bits for how in second.schemes.values()}) == ({3}, {4})
    assert len(first.schemes) + len(second.schemes) == sum(type(each) is nn.Linear for each in done.modules()) - 1, "all but the head"
    assert {name: how.bits for name, how in integers.recorded(done).items()} == {
        name: how.bits for each in (first, second) for name, how in each.schemes.items()
    }, "the record of the first is not lost"


def test_each_of_several_begins_when_it_was_told(tmp_path: Path) -> None:
    early, late = qat(include=["*mlp*"]), qat(include=["*self_attn*"], start=3)
    trainer = fit(tmp_path, early, late, ByOwner(), max_steps=4)
    (seen,) = [each.seen for each in trainer.callbacks if isinstance(each, ByOwner)]  # type: ignore[attr-defined]
    assert seen == {early.owner: [1.0] * 4, late.owner: [0.0, 0.0, 0.0, 1.0]}


class ByOwner(pl.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        by_owner = {each.owner: each.strength for each in fake_quant.quantisers(pl_module)}
        for owner, strength in by_owner.items():
            self.seen.setdefault(owner, []).append(strength)


def test_two_of_the_same_layer_are_refused() -> None:
    model = models.causal_lm()
    qat(include=["*mlp*"]).prepare(model, CausalLM())
    with pytest.raises(ConfigError, match=r"two of them quantise 'model.layers.0.mlp.*'; say in include or exclude"):
        qat(include=["*down_proj", "*up_proj"]).prepare(model, CausalLM())


def test_layers_are_found_by_what_is_in_them_when_others_were_taken_out_before() -> None:
    """Of the layers 0, 1, 2 the first, which is not quantised, is taken out: 1 and 2 are 0 and 1 then."""
    model, callback = models.causal_lm(num_hidden_layers=3), qat(exclude=["*layers.0.*"])
    callback.prepare(model, CausalLM())
    remove_layers(model, [1, 2])
    callback.finish(model)
    assert not any(parametrize.is_parametrized(each) for each in model.modules())
    assert list(integers.recorded(model)) == list(linears(model, None, None, "here"))
    assert all(len(integers.integers(model.get_submodule(name).weight, how)) == 2 for name, how in integers.recorded(model).items())


# ---- ranks


class Leg(NamedTuple):
    losses: list[float]
    norms: list[float]
    levels: dict[str, Tensor]


def train(folder: str, spec: str, scheme: str | None, warmup: int = 0) -> Leg:
    """Train six steps; give what was logged and the integers that were saved."""
    path, ranks = Path(folder), int(os.environ["WORLD_SIZE"])
    record, module = runs.Record(), pair.module(path)
    callbacks = [] if scheme is None else [qat(scheme=scheme, warmup=warmup)]
    trainer = runs.trainer(spec, ranks, max_steps=6, callbacks=[*callbacks, record])
    trainer.fit(module, pair.data(path, batch_size=4 // ranks, seed=1))
    report.save(trainer, module, path / f"{spec}-{scheme}")
    if trainer.global_rank > 0:
        return Leg(record.losses, record.norms, {})
    saved: Any = AutoModelForCausalLM.from_pretrained(path / f"{spec}-{scheme}" / "student")
    found = {name: integers.integers(saved.get_submodule(name).weight, how)[0] for name, how in integers.recorded(saved).items()}
    return Leg(record.losses, record.norms, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "warmup", "exact", "specs"),
    [("ternary", 2, 4, ["ddp", "ZeRO-2", "ZeRO-3", "fsdp2"]), ("int8-int4", 0, 1, ["ZeRO-3"])],
)
def test_two_ranks_are_one_process(scheme: str, warmup: int, exact: int, specs: list[str], tmp_path: Path) -> None:
    """To rounding in the first steps. Later a weight on the edge of two levels falls to either side: seldom for ternary ones, while of
    torchao's integers the largest of each group always lies on such an edge."""
    pair.data(tmp_path)
    (alone,), (floats,) = (run_ranks(train, 1, str(tmp_path), "auto", each, warmup) for each in (scheme, None))
    assert (alone.losses[0] == floats.losses[0]) == (warmup > 0), "λ begins with 0"
    assert min(abs(alone.norms[step] - floats.norms[step]) for step in (1, 2, 3)) > 1e-4, "the quantisation shows in the gradient"
    for spec in specs:
        first, second = run_ranks(train, 2, str(tmp_path), spec, scheme, warmup)
        for leg in (first, second):
            assert leg.losses[:exact] == pytest.approx(alone.losses[:exact], abs=1e-5), spec
            assert leg.norms[:exact] == pytest.approx(alone.norms[:exact], abs=1e-5), spec
            assert leg.losses == pytest.approx(alone.losses, abs=5e-3), spec
        assert first.levels.keys() == alone.levels.keys()
        flat, expected = (torch.cat([each.flatten() for each in leg.levels.values()]).int() for leg in (first, alone))
        assert (flat != expected).float().mean() < (0.01 if scheme == "ternary" else 0.5), spec


def settle(folder: str, spec: str) -> tuple[dict[str, int], list[int]]:
    """Train a step under a budget; give the bits that were chosen, and those that the student computes with."""
    path, ranks = Path(folder), int(os.environ["WORLD_SIZE"])
    callback = qat(scheme="int4", budget=3.2, choices=(2, 4, 8))
    module = pair.module(path, student=Pretrained(str(path / "teacher")))
    trainer = runs.trainer(spec, ranks, max_steps=1, callbacks=[callback])
    trainer.fit(module, pair.data(path, batch_size=4 // ranks, seed=1))
    assert module.teacher is not None
    found = fake_quant.weights_of(student_of(trainer), callback.owner).values()
    return {name: how.bits for name, how in callback.schemes.items()}, [int(each.bits) for _, each in found]


@pytest.mark.slow
def test_ranks_choose_the_bits_that_one_process_does(tmp_path: Path) -> None:
    pair.data(tmp_path)
    ((expected, computed),) = run_ranks(settle, 1, str(tmp_path), "auto")
    assert len(set(expected.values())) > 1
    assert run_ranks(settle, 2, str(tmp_path), "ZeRO-3") == [(expected, computed)] * 2
    assert computed == list(expected.values())


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheme": "in4"}, r"there is no 'in4'. Did you mean 'int4'"),
        ({"start": -1}, r"start must be at least 0, got -1; below 1 it is a share of the steps, else a step"),
        ({"warmup": -0.1}, r"warmup must be at least 0, got -0\.1"),
        ({"bits": {"*": 1}}, r"bits must be 2 to 8, got 1; for three values take scheme: ternary"),
        ({"bits": {"*": 4}, "budget": 3.0}, r"leave one of them out"),
        ({"scheme": "ternary", "budget": 3.0}, r"bits and budget are for schemes of integers, not for ternary"),
        ({"budget": 3.0, "calibration": 0}, r"choices and calibration, in rows, are at least 1 of each; got \[2, 3, 4, 8\] and 0"),
        ({"budget": 3.0, "choices": []}, r"choices and calibration, in rows, are at least 1 of each; got \[\] and 16"),
        ({"budget": 9}, r"budget is 9 bits a weight, but choices are \[2, 3, 4, 8\]; take one between them"),
    ],
)
def test_options_that_cannot_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        qat(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"include": ["*q_prj"]}, r"QuantizationAwareTraining\.include: no linear layer is called '\*q_prj'. Did you mean 'q_proj'"),
        (
            {"group_size": 32},
            r"group_size is 32, which does not divide the 16 inputs of 'model\.layers\.0\.self_attn\.q_proj'; set group_size: 16",
        ),
        ({"bits": {"*nope*": 4}}, r"bits: '\*nope\*' matches none of the layers; there are model\.layers\.0"),
        ({"scheme": "fp8", "group_size": None}, r"fp8 needs a GPU of compute capability 8\.9 or newer"),
        ({"start": 12}, r"start is step 12 and warmup takes 0 steps, but training has 10"),
        ({"start": 0.5, "warmup": 0.5}, r"start is step 5 and warmup takes 5 steps, but training has 10: the student would be saved more"),
        ({"include": ["lm_head"]}, r"the weight of 'lm_head' is shared with another module"),
    ],
)
def test_what_this_student_or_run_cannot_have(given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        fit(tmp_path, qat(**given))
