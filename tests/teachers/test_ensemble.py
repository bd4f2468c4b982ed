"""The mean of several teachers, against float64 from the formulas."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import objective
from distill.losses.chunked import chunked_objective
from distill.losses.divergence import ForwardKL, ReverseKL
from distill.losses.measure import measure
from distill.tasks import CausalLM, Task
from distill.teachers.base import Teacher
from distill.teachers.ensemble import Ensemble
from distill.teachers.online import OnlineTeacher
from distill.types import Batch, ConfigError, MixedTarget, Outputs, SparseTarget, Support
from tests import pair
from tests.models import VOCAB, causal_lm, save, tokenizer, tokens

CPU = torch.device("cpu")
B, T, V = 2, 3, 7


class Given(Teacher):
    """Gives a target that it was given, and writes down what it is asked."""

    def __init__(self, target: Outputs | SparseTarget, support: Support = "classes", name: str = "given", temperature: float | None = None):
        self.target, self.known, self.name, self.T = target, support, name, temperature
        self.asked: list[tuple[str, Any]] = []

    def recipe_needed(self) -> str | None:
        return None if self.name == "given" else f"{self.name}.yaml"

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        self.asked.append(("setup", dtype))

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        self.asked.append(("check", expected))

    def check_rows(self, fingerprint: Callable[[], str]) -> None:
        self.asked.append(("check_rows", fingerprint()))

    def spread(self, strategy: Any) -> None:
        self.asked.append(("spread", strategy))

    def ahead(self, batch: Batch) -> None:
        self.asked.append(("ahead", batch))

    def beside(self, student: nn.Module) -> None:
        self.asked.append(("beside", student))

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs | SparseTarget:
        seen = {tap: torch.full((B, T, 1), float(len(self.name))) for tap in taps}
        return Outputs(self.target.features, self.target.head, seen) if isinstance(self.target, Outputs) else self.target

    @property
    def support(self) -> Support:
        return self.known

    @property
    def temperature(self) -> float | None:
        return self.T

    def describe(self) -> dict[str, Any]:
        return {"parameters": len(self.name), "trainable": 0, "megabytes": 0.5, "dtype": "float32"}


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*(shape or (B, T, V)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(seed: int, **more: Any) -> Given:
    return Given(Outputs(logits(seed), nn.Identity()), **more)


def drawn(seed: int, T_: float = 1.0) -> Given:
    """Two draws a position, as counts."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(V, generator=rng)[:2] for _ in range(B * T)]).view(B, T, 2)
    return Given(SparseTarget(ids, torch.tensor([0.75, 0.25]).expand(B, T, 2), torch.zeros(B, T), T_), "draws", temperature=T_)


def likeliest(seed: int, k: int = 3) -> Given:
    probs, ids = logits(seed).softmax(-1).topk(k)
    return Given(SparseTarget(ids, probs.float(), 1 - probs.sum(-1).float(), 1.0), "bins", temperature=1.0)


def evaluated(ensemble: Teacher, loss: Any, student: Tensor) -> tuple[float, Tensor]:
    """The sum over positions and its gradient with respect to the student's logits."""
    leaf = student.clone().requires_grad_()
    labels = torch.zeros(B, T, dtype=torch.long)
    total = chunked_objective(Outputs(leaf, nn.Identity()), ensemble({}), labels, {"kd": loss}, {"kd": 1.0}, V, chunk=4)[0]
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


def by_hand(p: Tensor, student: Tensor, T_: float, reverse: bool = False) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    q = (leaf / T_).softmax(-1)
    value = T_**2 * ((q * (q / p).log()).sum() if reverse else (p * (p / q).log()).sum())
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


@pytest.mark.parametrize("T_", [1.0, 2.0])
@pytest.mark.parametrize("mean", ["probabilities", "log_probabilities"])
@pytest.mark.parametrize("loss", [ForwardKL, ReverseKL])
def test_means_of_softened_distributions(T_: float, mean: str, loss: Callable[..., Any]) -> None:
    first, second = logits(0), logits(1)
    ensemble = Ensemble([dense(0), dense(1)], [3, 1], mean)  # type: ignore[arg-type]
    softened = [(z / T_).softmax(-1) for z in (first, second)]
    p = 0.75 * softened[0] + 0.25 * softened[1]
    if mean == "log_probabilities":
        p = softened[0] ** 0.75 * softened[1] ** 0.25
        p = p / p.sum(-1, keepdim=True)
    value, gradient = evaluated(ensemble, loss(T_), logits(2))
    true, slope = by_hand(p, logits(2), T_, reverse=loss is ReverseKL)
    assert value == pytest.approx(true, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-7)
    assert ensemble.support == "classes"


def test_three_teachers_weigh_the_same_by_default_and_a_weight_of_0_is_none() -> None:
    p = torch.stack([logits(i).softmax(-1) for i in range(3)]).mean(0)
    assert evaluated(Ensemble([dense(0), dense(1), dense(2)]), ForwardKL(), logits(3))[0] == pytest.approx(
        by_hand(p, logits(3), 1.0)[0], rel=1e-6
    )
    alone = evaluated(Ensemble([dense(0)]), ForwardKL(), logits(3))[0]
    assert evaluated(Ensemble([dense(0), dense(1)], [2, 0]), ForwardKL(), logits(3))[0] == alone


def test_draws_are_scattered_into_the_mean() -> None:
    one, two = dense(0), drawn(1)
    ensemble = Ensemble([one, two], [1, 3])
    assert isinstance(two.target, SparseTarget)
    counts = torch.zeros(B, T, V, dtype=torch.float64).scatter_(-1, two.target.ids, two.target.probs.double())
    value, gradient = evaluated(ensemble, ForwardKL(), logits(2))
    true, slope = by_hand(0.25 * logits(0).softmax(-1) + 0.75 * counts, logits(2), 1.0)
    assert value == pytest.approx(true, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-7)
    assert ensemble.support == "draws"
    assert ensemble({}).how == "probabilities"


def test_draws_at_another_temperature() -> None:
    one, two = dense(0), drawn(1, 2.0)
    assert isinstance(two.target, SparseTarget)
    counts = torch.zeros(B, T, V, dtype=torch.float64).scatter_(-1, two.target.ids, two.target.probs.double())
    ensemble = Ensemble([one, two])
    value, gradient = evaluated(ensemble, ForwardKL(2.0), logits(2))
    true, slope = by_hand(0.5 * (logits(0) / 2).softmax(-1) + 0.5 * counts, logits(2), 2.0)
    assert value == pytest.approx(true, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-7)
    assert ensemble.temperature == 2.0


def test_with_a_tail_each_is_evaluated_apart_with_the_gradient_of_the_mean() -> None:
    """The gradient on K bins and a tail: `q − p` on the known classes, the tail's in proportion to q."""
    one, two = dense(0), likeliest(1)
    ensemble = Ensemble([one, two], [1, 3])
    assert (ensemble({}).how, ensemble.support) == ("apart", "draws")
    assert isinstance(two.target, SparseTarget)
    q, p = logits(2).softmax(-1), logits(0).softmax(-1)
    known = torch.zeros(B, T, V, dtype=torch.bool).scatter_(-1, two.target.ids, True)
    kept = torch.zeros(B, T, V, dtype=torch.float64).scatter_(-1, two.target.ids, two.target.probs.double())
    rest, tail = q.masked_fill(known, 0), two.target.tail.double()
    of_tail = rest * (1 - tail / rest.sum(-1))[..., None]
    binned = torch.where(known, q - kept, of_tail)
    bins = (kept * (kept / q).log()).nan_to_num(0).sum(-1) + tail * (tail / rest.sum(-1)).log()
    value, gradient = evaluated(ensemble, ForwardKL(), logits(2))
    assert value == pytest.approx((0.25 * (p * (p / q).log()).sum() + 0.75 * bins.sum()).item(), rel=1e-5)
    torch.testing.assert_close(gradient, 0.25 * (q - p) + 0.75 * binned, rtol=1e-5, atol=1e-6)


def test_only_terms_that_are_linear_in_the_teacher_pass_where_a_target_is_sparse() -> None:
    for part in (drawn(1), likeliest(1)):
        support = Ensemble([dense(0), part]).support
        objective.check_support({"kd": ForwardKL()}, support)
        with pytest.raises(ConfigError, match="ReverseKL needs"):
            objective.check_support({"kd": ReverseKL()}, support)


@pytest.mark.parametrize("part", [drawn(1), likeliest(1)])
def test_log_probabilities_want_all_classes(part: Given) -> None:
    with pytest.raises(ConfigError, match=r"wants every teacher's probability of every class, but teacher 2 \(given\) knows some"):
        Ensemble([dense(0), part], mean="log_probabilities").check(None, {})


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1.0], "has 1 numbers for 2 teachers"), ([1, -1], "must be ≥ 0"), ([0, 0], "sum above 0"), ([1, float("nan")], "must be ≥ 0")],
)
def test_wrong_weights(weights: list[float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Ensemble([dense(0), dense(1)], weights)


def test_wrong_teachers() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        Ensemble([])
    with pytest.raises(ConfigError, match=r"2 is itself made of several \(Ensemble\)"):
        Ensemble([dense(0), Ensemble([dense(1)])])
    with pytest.raises(ConfigError, match=r"different temperatures \(1: 1, 2: 2\)"):
        Ensemble([drawn(0), drawn(1, 2.0)]).check(None, {})
    with pytest.raises(ConfigError, match=r"teacher 2 \(given\): its target is in the tokens of another tokenizer"):
        Ensemble([dense(0), dense(1, support="text")]).check(None, {})


def test_everything_goes_to_every_teacher() -> None:
    parts = [dense(0, name="a"), dense(1, name="bc")]
    ensemble = Ensemble(list(parts))
    student, batch = nn.Linear(1, 1), {"a": torch.zeros(1)}
    ensemble.setup(CausalLM(), CPU, torch.float16)
    ensemble.check(None, {"vocab_size": 3})
    ensemble.check_rows(lambda: "f")
    ensemble.spread("strategy")  # type: ignore[arg-type]
    ensemble.ahead(batch)
    ensemble.beside(student)
    for part in parts:
        assert part.asked == [
            ("setup", torch.float16),
            ("check", {"vocab_size": 3}),
            ("check_rows", "f"),
            ("spread", "strategy"),
            ("ahead", batch),
            ("beside", student),
        ]
    assert ensemble.recipe_needed() == "a.yaml"
    assert Ensemble([dense(0), dense(1, name="bc")]).recipe_needed() == "bc.yaml"
    assert ensemble.describe() == {"parameters": 3, "trainable": 0, "megabytes": 1.0, "dtype": "float32"}
    assert ensemble.name == "0.5 × a + 0.5 × bc"


def test_activations_are_those_of_the_first() -> None:
    target = Ensemble([dense(0, name="a"), dense(1, name="bc")])({}, ["tap"])
    assert isinstance(target, MixedTarget)
    assert target.taps["tap"].unique().tolist() == [1.0]


def test_it_measures_a_student() -> None:
    ensemble = Ensemble([dense(0), dense(1)])
    p, q = (logits(0).softmax(-1) + logits(1).softmax(-1)) / 2, logits(2).softmax(-1)
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    found = measure(Outputs(logits(2), nn.Identity()), ensemble({}), labels, V)
    assert found["kl"].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    assert found["teacher_loss"].item() == pytest.approx(-p.gather(-1, labels[..., None]).log().sum().item(), rel=1e-6)
    assert found["teacher_accuracy"].item() == (p.argmax(-1) == labels).sum().item()


def test_real_models_are_frozen_and_a_mistake_names_the_teacher(tmp_path: Path) -> None:
    folders = [save(causal_lm(seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    ensemble = Ensemble([OnlineTeacher(folder) for folder in folders])
    ensemble.setup(CausalLM(), CPU, torch.float32)
    ensemble.check(tokenizer(), {"vocab_size": VOCAB})
    ensemble.assert_frozen()
    batch = {"input_ids": tokens()}
    target = ensemble(batch, ["model.layers.0"])
    for seed, part in enumerate(target.parts):
        assert isinstance(part, Outputs)
        torch.testing.assert_close(part.head(part.features), causal_lm(seed=seed)(tokens()).logits)
    assert list(target.taps) == ["model.layers.0"]
    assert len(ensemble.models()) == 2
    ensemble.models()[1].train()
    with pytest.raises(AssertionError, match="training mode"):
        ensemble.assert_frozen()
    with pytest.raises(ConfigError, match=r"teacher 2 \(\./nowhere\): model\.teacher\.model: no folder"):
        Ensemble([OnlineTeacher(folders[0]), OnlineTeacher("./nowhere")]).setup(CausalLM(), CPU, torch.float32)


def test_a_student_trains_on_it(tmp_path: Path) -> None:
    data = pair.data(tmp_path, batch_size=4)
    ensemble = Ensemble([OnlineTeacher(str(tmp_path / "teacher")) for _ in range(2)], [1, 3])
    runs = []
    for teacher in (ensemble, OnlineTeacher(str(tmp_path / "teacher"))):  # two of one kind teach what one does
        gradients = pair.Gradients()
        trainer = pair.trainer(max_steps=2, callbacks=[gradients], limit_val_batches=1, val_check_interval=2)
        trainer.fit(pair.module(tmp_path, teacher=teacher), data)
        runs.append((gradients.steps, trainer.callback_metrics["val/kl"]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-6)
