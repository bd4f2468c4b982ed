import pytest
import torch
from torch import nn

from distill.balance.base import Measured
from distill.losses.adaptive import AdaptiveKL
from distill.losses.base import Loss
from distill.losses.class_weighted import ClassWeighted, FrequencyPower
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy, ZLoss
from distill.losses.jensen_shannon import JensenShannon
from distill.objective import (
    WHAT,
    check,
    check_checkpoint,
    check_support,
    evaluate,
    exact_figures,
    figures,
    heads_gathered,
    without_teacher,
)
from distill.types import Batch, ConfigError, MixedTarget, Outputs, SparseTarget, Support, Target


def test_without_a_teacher_the_ratios_stay() -> None:
    terms = {"ce": CrossEntropy(), "kd": ForwardKL(), "z": ZLoss()}
    kept, weights = without_teacher(terms, {"ce": 0.2, "kd": 0.8, "z": 1e-4})
    assert list(kept) == ["ce", "z"]
    assert weights == {"ce": 1.0, "z": pytest.approx(5e-4)}


def test_cross_entropy_joins_where_nothing_teaches() -> None:
    kept, weights = without_teacher({"kd": ForwardKL(), "z": ZLoss()}, {"kd": 0.5, "z": 1e-4})
    assert isinstance(kept["ce"], CrossEntropy)
    assert weights == {"z": pytest.approx(2e-4), "ce": 1.0}
    assert without_teacher({"kd": ForwardKL()}, {"kd": 1.0})[1] == {"ce": 1.0}


def test_terms_are_looked_at() -> None:
    with pytest.raises(ConfigError, match="is empty; give at least one term"):
        check({}, True)
    with pytest.raises(ConfigError, match=r"\['lr'\] are names of the log"):
        check({"lr": CrossEntropy()}, True)
    with pytest.raises(ConfigError, match=r"\['kd'\] need a teacher"):
        check({"ce": CrossEntropy(), "kd": ForwardKL()}, False)


def test_a_checkpoint_must_hold_what_the_terms_learned() -> None:
    losses = nn.ModuleDict({"kd": ForwardKL(), "own": nn.Linear(1, 1)})
    good = {f"losses.{key}": value for key, value in losses.state_dict().items()} | {"student.w": torch.ones(1)}
    check_checkpoint(losses, good)
    with pytest.raises(ConfigError, match=r"in \['own'\]"):
        check_checkpoint(losses, {"student.w": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"in \['other'\]"):
        check_checkpoint(losses, good | {"losses.other.w": torch.ones(1)})


def test_figures_of_every_term() -> None:
    measured = Measured({"ce": 2.0, "kd": 3.0}, {"ce": 0.1, "kd": 0.2}, torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
    found = figures({"ce": CrossEntropy(), "kd": ForwardKL(4.0)}, {"ce": 0.5, "kd": 2.0}, measured)
    assert found == {
        "train/kd_temperature": 4.0,
        "train/ce_weight": 0.5,
        "train/kd_weight": 2.0,
        "train/ce_weighted": 1.0,
        "train/kd_weighted": 6.0,
        "train/ce_grad_norm": 0.1,
        "train/kd_grad_norm": 0.2,
    }
    assert measured.gram is not None
    exact = exact_figures({"ce": CrossEntropy(), "kd": ForwardKL()}, measured.gram)
    assert exact == {"train/ce_grad_norm_exact": 2.0, "train/kd_grad_norm_exact": 3.0}


# ---- what a target is known on


@pytest.mark.parametrize(
    ("term", "support", "message"),
    [
        (
            AdaptiveKL(),
            "bins",
            r"model\.losses\.kd: AdaptiveKL needs the probabilities of all classes, but model\.teacher gives the likeliest classes and one "
            r"bin for the rest; take a divergence that holds on bins, e\.g\. ForwardKL or JensenShannon, or a teacher in memory",
        ),
        (
            JensenShannon(),
            "draws",
            r"JensenShannon needs the probabilities of all classes or the likeliest classes and one bin for the rest, but model\.teacher "
            r"gives classes drawn at random; take ForwardKL",
        ),
        (ForwardKL(), "text", r"gives a target in the tokens of another tokenizer; take a term across tokenizers"),
        (ClassWeighted(JensenShannon(), FrequencyPower()), "draws", r"ClassWeighted needs the probabilities of all classes or"),
    ],
)
def test_a_term_that_is_wrong_on_a_target_is_refused(term: nn.Module, support: Support, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_support({"ce": CrossEntropy(), "kd": term}, support)


class AcrossTokenizers(ForwardKL):
    supports = frozenset({"text"})


def test_a_term_across_tokenizers_is_refused_on_classes() -> None:
    with pytest.raises(
        ConfigError, match=r"needs a target in the tokens of another tokenizer, but model\.teacher gives the probabilities of all"
    ):
        check_support({"x": AcrossTokenizers()}, "classes")
    check_support({"x": AcrossTokenizers()}, "text")


def test_what_is_right_on_a_target_is_taken() -> None:
    everywhere = {"ce": CrossEntropy(), "z": ZLoss()}
    for support in WHAT:
        check_support(everywhere, support)
    for support in ("classes", "bins", "draws"):
        check_support(
            {**everywhere, "kd": ForwardKL(), "hidden": TapDistance(), "weighted": ClassWeighted(ForwardKL(), FrequencyPower())}, support
        )
    for support in ("classes", "bins"):
        check_support({"kd": JensenShannon(), "weighted": ClassWeighted(JensenShannon(), FrequencyPower())}, support)


# ---- targets of every kind


class TapDistance(Loss):
    """Squared distance of one tap, over all positions."""

    student_taps = teacher_taps = ("it",)

    def forward(self, student: Outputs, teacher: Target, batch: Batch) -> torch.Tensor:
        return (student.taps["it"] - teacher.taps["it"]).square().sum()


def test_terms_on_taps_read_those_of_any_target() -> None:
    torch.manual_seed(0)
    taps, labels = {"it": torch.randn(1, 3, 2)}, torch.tensor([[0, 1, 2]])
    whole = Outputs(torch.randn(1, 3, 4), nn.Identity(), taps)
    sparse = SparseTarget(torch.tensor([[[1], [0], [3]]]), torch.full((1, 3, 1), 0.6), torch.full((1, 3), 0.4), 1.0, taps)
    mixed = MixedTarget((whole, sparse), torch.full((1, 3, 2), 0.5), "apart", taps)
    for target in (whole, sparse, mixed):
        tap = torch.randn(1, 3, 2, requires_grad=True)
        student = Outputs(torch.randn(1, 3, 4, requires_grad=True), nn.Identity(), {"it": tap})
        terms = {"kd": ForwardKL(), "hidden": TapDistance()}
        micro = evaluate(terms, {"kd": 1.0, "hidden": 0.5}, student, target, {"labels": labels}, 4)
        micro.total.backward()
        torch.testing.assert_close(tap.grad, (tap - taps["it"]).detach())
        assert micro.sums["hidden"].item() == pytest.approx((tap - taps["it"]).square().sum().item())


def test_the_head_of_every_teacher_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gathered:
        def __init__(self, first: nn.Module, *more: nn.Module) -> None:
            self.modules = (first, *more)

        def __enter__(self) -> nn.Module:
            opened.extend(self.modules)
            return self.modules[0]

        def __exit__(self, *_: object) -> None:
            closed.extend(self.modules)

    monkeypatch.setattr("distill.objective.gathered", Gathered)
    student, first, second = (Outputs(torch.zeros(1, 1, 2), nn.Linear(2, 2)) for _ in range(3))
    sparse, kd = SparseTarget(torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1), torch.zeros(1, 1)), ForwardKL()
    mixed = MixedTarget((first, sparse, second), torch.full((1, 1, 3), 1 / 3), "apart")
    for target, heads in ((None, []), (first, [first.head]), (sparse, []), (mixed, [first.head, second.head])):
        opened: list[nn.Module] = []
        closed: list[nn.Module] = []
        with heads_gathered(student, target, [kd]) as (own, whole):
            assert opened == [student.head, kd, *heads]
            assert closed == []
            assert own.head is student.head
            assert type(whole) is type(target)
        assert {*closed} == {*opened}


class OfFeatures(Loss):
    needs_teacher = False
    on_features = True

    def forward(self, student: Outputs, teacher: Target, batch: Batch) -> torch.Tensor:
        return 3 * student.head(student.features).sum()


def test_the_gradient_of_a_term_on_features_is_measured_at_them() -> None:
    """∂/∂x of 3 Σ x wᵀ is 3 w at each of the two positions, whatever the term weighs."""
    w = torch.tensor([1.0, 2.0])
    head = nn.Linear(2, 1, bias=False)
    head.weight = nn.Parameter(w[None].clone())
    x = torch.randn(1, 2, 2, requires_grad=True)
    found = evaluate({"it": OfFeatures()}, {"it": 0.5}, Outputs(x, head), None, {"labels": torch.zeros(1, 2).long()}, 1, norms=True)
    found.total.backward()
    assert torch.equal(x.grad, 0.5 * 3 * w.expand(1, 2, 2))
    torch.testing.assert_close(found.branches["it"].square, torch.tensor(2 * 9 * 5.0))
