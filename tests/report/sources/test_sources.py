"""What each source of the signal would cost, against formulas written out by hand, and the rule that takes one."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from distill.hub import describe
from distill.losses.adaptive import AdaptiveKL
from distill.losses.base import Term
from distill.losses.class_weighted import ClassWeighted, FrequencyPower
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.losses.jensen_shannon import JensenShannon
from distill.losses.logits import LogitMSE
from distill.report.sources.dry_run import DryRun
from distill.report.sources.situation import Figure, Situation, allowed, int8_bytes, temperatures
from distill.report.sources.sources import BYTES_PER_CLASS, ENTRY_BYTES, Cost, costs, recommend, table
from distill.schedule import Linear
from distill.teachers.base import Teacher
from distill.teachers.completions import _entry
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from distill.teachers.quantise import quantise
from distill.teachers.remote import RemoteTeacher
from distill.teachers.served import ServedTeacher
from distill.types import Batch, Outputs
from tests import pair
from tests.stores import written
from tests.teachers.serving import serving, url

GB = 1e9
# 1,000,000 rows, global batch 4 × 8 × 2 = 64 rows, so 15,625 steps an epoch
BASE = Situation(
    source="online",
    support="classes",
    weights=Figure(16 * GB, measured=True),
    int8=8.5 * GB,
    others=20 * GB,
    room=80 * GB,
    forward=Figure(0.5, measured=True),
    micro_batches=4,
    ranks=2,
    batch_size=8,
    rows=1_000_000,
    valid=400_000_000,
    steps=15_625,
    positions=8 * 512,
    predictions=8 * 512,
    labels=12_000,
    width=4096,
    item=2,
    taps=0,
    classes=32_000,
    allowed=frozenset({"classes", "bins", "draws"}),
    temperatures=frozenset({1.0}),
    disk=1000 * GB,
)


def named(s: Situation) -> dict[str, Cost]:
    return {cost.name: cost for cost in costs(s)}


def value(figure: Figure | None) -> float:
    assert figure is not None
    return figure.value


# ---- the formulas


def test_a_model_in_memory_costs_its_weights_and_a_forward_pass_a_micro_batch() -> None:
    found = named(BASE)["online"]
    assert found.memory == Figure(16 * GB, measured=True)
    assert found.seconds == Figure(0.5 * 4)  # estimated, from one that was measured
    assert named(BASE)["online, quantize: int8"].memory == Figure(8.5 * GB)


def test_a_store_costs_bytes_a_position_and_one_pass_of_the_teacher() -> None:
    draws, top = named(BASE)["cached, draws: 64"], named(BASE)["cached, k: 50"]
    assert value(top.disk) == pytest.approx(400e6 * 50 * BYTES_PER_CLASS)
    assert 33 <= value(draws.disk) / 400e6 <= 38  # what scripts/bench/store.py finds at 64 draws
    assert 49 <= value(top.disk) / 400e6 <= 92  # and at k = 50
    for each in (draws, top):
        assert value(each.writing) == pytest.approx(1_000_000 / (8 * 2) * 0.5)
        assert value(each.pays_after) == pytest.approx(1.0)  # 2 s a step × 15,625 steps
        assert value(each.seconds) == 0
        assert each.memory is None
        assert not any(figure.measured for figure in (each.disk, each.writing, each.pays_after, each.seconds) if figure)


def test_a_small_vocabulary_costs_no_more_than_its_classes() -> None:
    found = named(replace(BASE, classes=16))
    assert value(found["cached, k: 50"].disk) == value(found["cached, draws: 64"].disk) == pytest.approx(400e6 * 16 * BYTES_PER_CLASS)
    assert value(found["served, k: 50"].network) == pytest.approx(12_000 * 16 * ENTRY_BYTES)


def test_hidden_states_in_a_store_are_a_byte_a_value_of_every_position() -> None:
    plain, tapped = (value(named(replace(BASE, taps=n))["cached, k: 50"].disk) for n in (0, 3))
    assert tapped - plain == pytest.approx(3 * 4096 * 1_000_000 * 512)


def test_features_travel_in_the_teachers_dtype_and_likeliest_tokens_as_json() -> None:
    found = named(BASE)
    assert value(found["remote (serve)"].network) == 8 * 512 * 4096 * 2 * 4
    assert value(named(replace(BASE, taps=2))["remote (serve)"].network) == 3 * 8 * 512 * 4096 * 2 * 4
    assert value(named(replace(BASE, predictions=8))["remote (serve)"].network) == 8 * 4096 * 2 * 4  # a classifier's
    assert value(found["served, k: 50"].network) == 12_000 * 50 * ENTRY_BYTES


def test_an_entry_of_json_is_about_as_long_as_is_said() -> None:
    torch.manual_seed(0)
    ids, logp = torch.randint(1000, 32_000, (1000,)).unique().tolist(), torch.randn(1000).sub(8).tolist()
    text = _entry(ids[:50], logp[:50], ids[0], logp[0], 1)
    assert len(text) / 50 == pytest.approx(ENTRY_BYTES, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_in_8_bits_are_those_that_quantising_leaves(tied: bool) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).bfloat16().requires_grad_(False)
    estimated = int8_bytes(model, 2)
    with torch.device("meta"):
        assert int8_bytes(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)), 2) == estimated
    assert estimated < describe(model)["megabytes"] * 1e6
    quantise(model)
    assert estimated == pytest.approx(describe(model)["megabytes"] * 1e6, rel=0.05)


# ---- what terms can have


@pytest.mark.parametrize(
    ("terms", "supports"),
    [
        ([CrossEntropy(), ForwardKL()], {"classes", "bins", "draws"}),
        ([ForwardKL(), JensenShannon()], {"classes", "bins"}),
        ([ForwardKL(), LogitMSE()], {"classes"}),
        ([ForwardKL(), HiddenMSE()], {"classes", "bins", "draws"}),
    ],
)
def test_what_every_term_is_right_on(terms: list[Term], supports: set[str]) -> None:
    assert allowed(terms) == supports


def test_temperatures_of_the_terms() -> None:
    assert temperatures([CrossEntropy(), ForwardKL(2.0), HiddenMSE()]) == {2.0}
    assert temperatures([ForwardKL(Linear(4.0, 2.0))]) == {2.0, 4.0}
    assert temperatures([ClassWeighted(ForwardKL(3.0), FrequencyPower(0.5))]) == {3.0}
    moving = ForwardKL(Linear(4.0, 2.0))
    moving.at(5, 10)
    temperatures([moving])
    assert moving.T == 3.0  # looked at, not moved


def test_what_terms_cannot_have_is_said() -> None:
    problems = lambda **changes: {name: cost.problem for name, cost in named(replace(BASE, **changes)).items()}
    assert not any(problems().values())
    bins = problems(allowed=frozenset({"classes", "bins"}))
    assert bins["cached, draws: 64"] == "a term is wrong on draws"
    assert bins["cached, k: 50"] == bins["served, k: 50"] == ""
    none = problems(allowed=frozenset({"classes"}))
    assert none["cached, draws: 64"] == none["cached, k: 50"] == none["served, k: 50"] == "a term needs all classes"
    assert none["online"] == none["remote (serve)"] == ""
    assert problems(temperatures=frozenset({1.0, 2.0}))["cached, k: 50"] == "the temperature of the terms moves"
    assert problems(temperatures=frozenset({2.0}))["served, k: 50"] == "it gives probabilities at temperature 1 alone"
    assert problems(taps=1)["served, k: 50"] == "it gives no hidden states"
    assert problems(taps=1)["cached, k: 50"] == ""


# ---- the rule


ONLY_CLASSES = frozenset({"classes"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"^Take online: the teacher fits \(16 GB beside 20 GB of 80 GB\), and the run sees the rows 1\.0 times, not more"),
        ({"steps": 2 * 15_625}, r"^Take online: .* 2\.0 times, not more"),
        # 10 epochs: 2 s × 156,250 steps less 31,250 s of writing
        ({"steps": 10 * 15_625}, r"^Take cached, draws: 64: the run sees the rows 10\.0 times, more than .* saves ≈ 3\.26 days"),
        ({"steps": 156_250, "allowed": frozenset({"classes", "bins"})}, r"^Take cached, k: 50: "),
        ({"steps": 156_250, "allowed": ONLY_CLASSES}, r"^Take online: .* fits .*, and a store cannot be had: a term needs all classes\.$"),
        ({"steps": 156_250, "disk": GB}, r"^Take online: .* a store of 14\.6 GB has no room on the disk \(1 GB are free\)\.$"),
        ({"steps": 156_250, "disk": 20 * GB}, r"^Take cached, draws: 64: "),
        ({"others": 60 * GB}, r"^Take cached, draws: 64: the teacher does not fit .* \(16 GB beside 60 GB of 80 GB\), but alone"),
        ({"others": 60 * GB, "allowed": ONLY_CLASSES}, r"^Take online, quantize: int8: in 8 bits \(8\.5 GB\) .*, as it is .* needs all"),
        ({"others": 70 * GB, "allowed": ONLY_CLASSES}, r"^Take remote: .* does not fit .* `python train\.py serve` .* all classes\.$"),
        ({"weights": Figure(140 * GB), "int8": 71 * GB}, r"^Take remote: .* does not fit either, so a store must be written elsewhere\.$"),
        ({"source": "remote", "weights": Figure(16 * GB)}, r"^Take online: "),
        ({"source": "cached", "support": "draws", "store": 9 * GB, "forward": None}, r"^Take the store: it is written"),
        ({"source": "served", "support": "bins", "weights": None}, r"^Take it as it is: only its server knows how large"),
        ({"source": "served", "support": "bins", "steps": 156_250}, r"^Take online: .* no store is written of a teacher that knows some"),
        ({"source": "other", "support": "text"}, r"^Take it as it is: only a model in memory tells texts in other tokens\.$"),
        ({"source": "other"}, r"^Take it as it is: the teacher fits"),
    ],
)  # fmt: skip
def test_recommendation(changes: dict[str, Any], said: str) -> None:
    assert re.search(said, recommend(replace(BASE, **changes)))


@pytest.mark.parametrize("source", ["online", "cached", "remote", "served", "other"])
def test_the_recommended_source_is_in_the_table(source: Any) -> None:
    for others in (20 * GB, 60 * GB, 75 * GB):
        for steps in (15_625, 156_250):
            s = replace(BASE, source=source, others=others, steps=steps)
            name = re.sub(r"^Take ([^:]+(?:: \w+)?): .*$", r"\1", recommend(s))
            name = {"remote": "remote (serve)", "it as it is": "as it is"}.get(name, name)
            assert any(cost.name.startswith(name) for cost in costs(s)) or (source == "other" and name == "remote (serve)")


# ---- the table


def shown(s: Situation) -> dict[str, str]:
    """The table as the dry run prints it: lines by their first words."""
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table(s))
    return {re.split(r"  |: not", line.strip())[0]: line for line in capture.get().splitlines() if line.strip()}


def test_the_table_marks_what_is_estimated() -> None:
    lines = shown(replace(BASE, taps=1, temperatures=frozenset({1.0, 2.0}), allowed=frozenset({"classes", "bins"})))
    plain = shown(BASE)
    assert plain["online"].split() == ["online", "16", "GB", "≈", "2"]  # counted, and estimated
    assert plain["online, quantize: int8"].split()[-3:] == ["≈", "8.5", "GB"]
    assert re.search(r"≈ 14\.6 GB +≈ 0 +≈ 8\.68 h +≈ 1\.0 epochs$", plain["cached, draws: 64"].rstrip())
    assert "≈ 134 MB" in plain["remote (serve)"]
    assert any("waits for nothing" in line for line in plain.values())
    assert "for one micro-batch the teacher took 0.5 s, measured once" in " ".join(plain.values())
    assert not any("not with these terms" in line for line in plain.values())
    text = " ".join(lines.values())
    assert "cached, draws: 64: not with these terms, a term is wrong on draws" in text
    assert "served, k: 50: not with these terms, it gives no hidden states" in text


def test_what_is_measured_has_no_mark() -> None:
    stored = replace(BASE, source="cached", support="bins", store=3 * GB, forward=None, weights=Figure(16 * GB))
    lines = shown(stored)
    assert re.fullmatch(r"cached, as it is +3 GB +≈ 0", lines["cached, as it is"].strip())
    assert re.fullmatch(r"online +≈ 16 GB", lines["online"].strip())  # not in memory, no pass timed


# ---- the run at hand


class Slow(OnlineTeacher):
    """Takes a tenth of a second at least."""

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        time.sleep(0.1)
        return super().__call__(batch, taps)


def dry_run(tmp_path: Path, teacher: Teacher | None, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Situation | None:
    """Fit for a step with the dry run's callback; give what it looked up, or None where it did not."""
    seen: list[Situation] = []

    def spy(s: Situation) -> Table:
        seen.append(s)
        return table(s)

    monkeypatch.setattr("distill.report.sources.dry_run.table", spy)
    module = pair.module(tmp_path, teacher=teacher, balancer=None, **kwargs)
    trainer = pair.trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[DryRun()])
    trainer.fit(module, pair.data(tmp_path, batch_size=4))
    assert trainer.global_step == 1
    assert len(seen) == (teacher is not None)
    return seen[0] if seen else None


HARD: dict[str, Term] = {"ce": CrossEntropy()}


def make_ensemble(tmp_path: Path) -> Teacher:
    return Ensemble([OnlineTeacher(str(tmp_path / "teacher")), OnlineTeacher(str(tmp_path / "teacher"))])


def test_a_run_with_a_teacher_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pair.data(tmp_path)
    teacher = Slow(str(tmp_path / "teacher"))
    s = dry_run(tmp_path, teacher, monkeypatch, losses={"ce": CrossEntropy(), "kd": ForwardKL(2.0), "hidden": HiddenMSE(layers="uniform")})
    assert s is not None
    assert teacher.model is not None
    rows = 58  # of 64, a tenth held out
    assert s.source == "online"
    assert s.weights == Figure(pytest.approx(4 * sum(p.numel() for p in teacher.model.parameters())), measured=True)
    assert s.forward is not None
    assert s.forward.measured
    assert 0.1 <= s.forward.value < 60
    assert (s.rows, s.batch_size, s.micro_batches, s.ranks) == (rows, 4, 2, 1)
    assert s.steps == 3 * (rows // 8)
    assert s.epochs == pytest.approx(3 * 7 * 8 / rows)
    assert s.predictions == s.positions
    assert s.positions % 4 == 0
    assert 0 < s.labels <= 2 * 4 * 32
    assert s.valid == sum(int((labels != -100).sum()) for labels in pair_rows(tmp_path))
    assert (s.width, s.item, s.taps, s.classes) == (24, 4, 2, 16)  # the embeddings and the last layer
    assert s.temperatures == {2.0}
    out = capsys.readouterr().out
    assert out.index("One real forward and backward: fine") < out.index("Sources of the signal") < out.index("\nTake ")
    for name in ("online", "quantize: int8", "draws: 64", "k: 50", "remote (serve)", "served"):
        assert name in out


def pair_rows(tmp_path: Path) -> list[torch.Tensor]:
    data = pair.data(tmp_path)
    data.setup()
    return [torch.as_tensor(row["labels"]) for row in data.train_set]


def test_a_run_without_a_teacher_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pair.data(tmp_path)
    assert dry_run(tmp_path, None, monkeypatch, losses=HARD) is None
    assert "Sources" not in capsys.readouterr().out


def test_a_run_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = written(tmp_path, draws=8)
    s = dry_run(tmp_path, teacher, monkeypatch, losses={"kd": ForwardKL()})
    assert s is not None
    assert (s.source, s.support, s.forward) == ("cached", "draws", None)
    assert s.store == pytest.approx(sum(f.stat().st_size for f in (tmp_path / "store").glob("shard-*.bin")))
    assert s.weights is not None
    assert not s.weights.measured  # of the model that wrote it
    found = named(s)
    assert found["cached, as it is"].disk == Figure(s.store, measured=True)
    assert found["online"].seconds is None
    assert "Take the store" in capsys.readouterr().out


@pytest.mark.parametrize(("make", "kind"), [(RemoteTeacher, "remote"), (ServedTeacher, "served")])
def test_a_run_from_a_server(
    make: Callable[..., Teacher], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path) as start:
        s = dry_run(tmp_path, make(url(start())), monkeypatch, losses={"kd": ForwardKL()})
    assert s is not None
    assert s.source == kind
    assert s.forward is not None
    assert s.forward.measured
    assert s.weights is not None
    assert not s.weights.measured
    assert (s.width, s.support) == ((24, "classes") if kind == "remote" else (None, "bins"))
    out = capsys.readouterr().out
    assert "Sources of the signal" in out
    assert "\nTake " in out


def test_a_run_with_several_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pair.data(tmp_path)
    s = dry_run(tmp_path, make_ensemble(tmp_path), monkeypatch, losses={"kd": AdaptiveKL()})
    assert s is not None
    assert s.source == "other"
    assert [cost.name for cost in costs(s)] == ["as it is", "cached, draws: 64", "cached, k: 50"]
    assert "Take it as it is" in capsys.readouterr().out
