import copy

import jsonargparse
import pytest
import torch
import yaml
from torch import Tensor, nn

import distill.losses
from distill.losses.base import TokenLoss
from distill.losses.chunked import chunked_objective
from distill.losses.class_weighted import (
    ClassWeighted,
    ClassWeights,
    EffectiveNumber,
    FrequencyPower,
    effective_number,
    frequency_power,
    mean_one,
)
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.losses.support import Distribution
from distill.schedule import Linear
from distill.types import ConfigError
from tests.losses.dense import Case, counts, setting
from tests.losses.test_divergence import reference_ForwardKL
from tests.losses.test_hard import reference_CrossEntropy

assert distill.losses.__path__, "imported so that short names are known"

settings_ClassWeighted = [  # noqa: N816
    {"term": ForwardKL(2.0), "class_weights": FrequencyPower(1.0, cap=None)},
    {"term": CrossEntropy(), "class_weights": EffectiveNumber(0.9, cap=1.5)},
]


def bisected(relative: Tensor, n: Tensor, cap: float) -> Tensor:
    """Find s in min(cap, s r) by halving an interval until the mean over the samples is 1: nothing like the sorted solution."""
    low, high = 0.0, 1e12
    for _ in range(120):
        s = (low + high) / 2
        mean = (n * (s * relative).clamp(max=cap)).sum() / n.sum()
        low, high = (s, high) if mean < 1 else (low, s)
    return (high * relative).clamp(max=cap)


def reference_ClassWeighted(  # noqa: N802
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, term: TokenLoss, class_weights: ClassWeights
) -> Tensor:
    n = counts(student_logits.shape[-1]).double()
    if isinstance(term, ForwardKL):
        w = n.mean() / n  # γ = 1: every class has the share 1/V
        return w[labels] * reference_ForwardKL(student_logits, teacher_logits, labels, 2.0)
    w = bisected(0.1 / (1 - 0.9**n), n, 1.5)
    return w[labels] * reference_CrossEntropy(student_logits, teacher_logits, labels)


def weigh(weights: ClassWeights, n: list[int], unit: str = "sample") -> Tensor:
    return weights.of(setting(len(n), unit, class_counts=lambda: torch.tensor(n)))


def test_frequency_power_by_hand() -> None:
    # n = 8, 2, 2 of 12. γ = 1: w = (12/3) / n. γ = 1/2: r = 1/√8, 1/√2, 1/√2, Σ n r = 2√2 + 2√2, s = 12 / 4√2 = 3/√2
    torch.testing.assert_close(weigh(FrequencyPower(1.0), [8, 2, 2]), torch.tensor([0.5, 2, 2], dtype=torch.float64))
    torch.testing.assert_close(weigh(FrequencyPower(0.5), [8, 2, 2]), torch.tensor([0.75, 1.5, 1.5], dtype=torch.float64))
    torch.testing.assert_close(weigh(FrequencyPower(0.0), [8, 2, 2]), torch.ones(3, dtype=torch.float64))


def test_effective_number_by_hand() -> None:
    # β = 1/2: E_n = 2 (1 − 2^−n) = 1, 3/2, 7/4 for n = 1, 2, 3; r = 1, 2/3, 4/7; Σ n r = 1 + 4/3 + 12/7 = 85/21; s = 6 · 21/85 = 126/85
    torch.testing.assert_close(effective_number(torch.tensor([1, 2, 3]), 0.5), torch.tensor([1, 2 / 3, 4 / 7], dtype=torch.float64))
    expected = torch.tensor([126 / 85, 84 / 85, 72 / 85], dtype=torch.float64)
    torch.testing.assert_close(weigh(EffectiveNumber(0.5), [1, 2, 3]), expected)


def test_effective_number_between_none_and_inverse_frequency() -> None:
    n = torch.tensor([1, 10, 1000, 1_000_000])
    torch.testing.assert_close(effective_number(n, 0.0), torch.ones(4, dtype=torch.float64))
    near_one = effective_number(n, 1 - 1e-15)
    torch.testing.assert_close(near_one, frequency_power(n, 1.0), rtol=1e-2, atol=0)


def test_the_cap_by_hand() -> None:
    # n = 8, 2, 2: without a cap 0.5, 2, 2. The cap 1.5 takes 2 · 0.5 from each rare class; 12 = 8 w + 4 · 1.5, so w = 0.75
    torch.testing.assert_close(weigh(FrequencyPower(1.0, cap=1.5), [8, 2, 2]), torch.tensor([0.75, 1.5, 1.5], dtype=torch.float64))
    # n = 6, 3, 1: without 10/18, 10/9, 10/3. At 2, s = (10 − 2)/2 = 4 for the others: 4/6 and 4/3
    torch.testing.assert_close(weigh(FrequencyPower(1.0, cap=2.0), [6, 3, 1]), torch.tensor([2 / 3, 4 / 3, 2], dtype=torch.float64))
    # at 1.2 the second class, which was under the cap before, is lifted above it: 10 = 6 w + 4 · 1.2
    torch.testing.assert_close(weigh(FrequencyPower(1.0, cap=1.2), [6, 3, 1]), torch.tensor([5.2 / 6, 1.2, 1.2], dtype=torch.float64))
    torch.testing.assert_close(weigh(FrequencyPower(1.0, cap=1.0), [6, 3, 1]), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("cap", [1.0, 1.001, 1.3, 2.0, 7.0, 1e6])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 3.0])
def test_the_cap_against_bisection(cap: float, gamma: float) -> None:
    n = torch.randint(1, 2000, (200,), generator=torch.Generator().manual_seed(0)).double() ** 2 // 1000 + 1
    found = mean_one(frequency_power(n, gamma), n, cap)
    torch.testing.assert_close(found, bisected(n**-gamma, n, cap), rtol=1e-9, atol=1e-12)
    assert ((found * n).sum() / n.sum()).item() == pytest.approx(1, abs=1e-12)


def test_a_class_of_a_classifier_that_never_occurs_is_refused() -> None:
    loss = ClassWeighted(CrossEntropy(), FrequencyPower())
    with pytest.raises(ConfigError, match=r"model\.losses\.it .* no training row has the label 'class1', 'class3'; add rows with it"):
        loss.prepare(setting(4, class_counts=lambda: torch.tensor([3, 0, 1, 0])))
    with pytest.raises(ConfigError, match=r"'class4' and 2 more; add rows"):
        loss.prepare(setting(7, class_counts=lambda: torch.zeros(7, dtype=torch.long)))


def test_a_token_that_never_occurs_counts_as_one_that_occurs_once() -> None:
    w = weigh(FrequencyPower(1.0, cap=None), [6, 1, 0, 0], unit="token")
    # r = 1/6, 1, 1, 1; over the 7 tokens that there are, Σ n r = 2, s = 7/2
    torch.testing.assert_close(w, torch.tensor([3.5 / 6, 3.5, 3.5, 3.5], dtype=torch.float64))
    capped = weigh(FrequencyPower(1.0, cap=2.0), [6, 1, 0, 0], unit="token")
    torch.testing.assert_close(capped, torch.tensor([5 / 6, 2, 2, 2], dtype=torch.float64))


def test_tokens_of_a_language_model() -> None:
    """Positions of packed rows, each weighed by its label; those without a label take no part."""
    loss = ClassWeighted(CrossEntropy(), FrequencyPower(1.0, cap=None))
    loss.prepare(setting(3, "token", class_counts=lambda: torch.tensor([8, 2, 2])))
    case = Case.random(shape=(3, 9), num_classes=3, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64)
    expected = case.dense(lambda s, t, y: weights[y] * nn.functional.cross_entropy(s, y, reduction="none"))
    found = case.chunked(loss, chunk=4)
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.features, expected.features)


def test_the_sum_over_the_training_data_of_a_constant_term_is_its_size() -> None:
    class One(TokenLoss):
        def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
            return torch.ones(len(labels_N))

    n = torch.tensor([50, 7, 1, 2])
    loss = ClassWeighted(One(), FrequencyPower(1.0, cap=3.0))
    loss.prepare(setting(4, class_counts=lambda: n))
    labels = torch.arange(4).repeat_interleave(n)
    torch.testing.assert_close(loss(Distribution(torch.zeros(60, 4)), None, labels).sum(), torch.tensor(60.0))


def test_it_passes_everything_on_to_its_term() -> None:
    loss = ClassWeighted(ForwardKL(Linear(4.0, 2.0)), FrequencyPower())
    loss.prepare(setting(3))
    loss.at(5, 10)
    assert loss.scheduled() == {"temperature": 3.0}
    assert loss.needs_teacher
    assert not ClassWeighted(CrossEntropy(), FrequencyPower()).needs_teacher


def test_it_prepares_its_term() -> None:
    twice = ClassWeighted(ClassWeighted(CrossEntropy(), FrequencyPower(1.0)), FrequencyPower(1.0))
    twice.prepare(setting(3, class_counts=lambda: torch.tensor([8, 2, 2])))
    labels = torch.arange(3)
    expected = torch.tensor([0.25, 4.0, 4.0]) * torch.tensor(3.0).log()
    torch.testing.assert_close(twice(Distribution(torch.zeros(3, 3)), None, labels), expected)


def test_without_a_teacher() -> None:
    case = Case.random()
    loss = ClassWeighted(CrossEntropy(), FrequencyPower(0.0))
    loss.prepare(setting(case.num_classes))
    total, _, _ = chunked_objective(case.student(), None, case.labels, {"it": loss}, {"it": 1.0}, case.num_classes)
    torch.testing.assert_close(total.double(), case.dense(reference_CrossEntropy).value, rtol=1e-5, atol=0)


def test_no_checkpoint_holds_the_weights_and_they_are_as_before_after_prepare() -> None:
    loss = ClassWeighted(ForwardKL(), FrequencyPower())
    fresh = copy.deepcopy(loss)
    loss.prepare(setting(5))
    assert not loss.state_dict()
    fresh.load_state_dict(loss.state_dict(), strict=True)
    fresh.prepare(setting(5))
    # counts 1, 50, 47, 42, 35: 35 / n, of which the first, 35, is capped; the others share 175 − 10: 165/4/50 = 0.825
    assert fresh.summary() == loss.summary() == ["class weights 0.825 to 10, 1 of 5 at the cap"]


@pytest.mark.parametrize("before", [True, False])
def test_weights_follow_the_module_but_stay_exact(before: bool) -> None:
    loss = ClassWeighted(CrossEntropy(), FrequencyPower(0.5))
    if before:
        loss.prepare(setting(9))
    loss.to(torch.bfloat16)
    if not before:
        loss.prepare(setting(9))
    torch.testing.assert_close(loss.w.values_V, FrequencyPower(0.5).of(setting(9)), rtol=0, atol=0)
    assert loss(Distribution(torch.randn(4, 9)), None, torch.arange(4)).dtype == torch.float32
    assert loss.to("meta").w.values_V.device.type == "meta"
    loss.prepare(setting(9))
    assert loss.w.values_V.device.type == "meta"


@pytest.mark.parametrize("weights", [FrequencyPower(0.5), EffectiveNumber(0.9)])
def test_prepare_where_new_tensors_are_made_elsewhere(weights: ClassWeights) -> None:
    """A trainer prepares terms with the GPU as default device, and half precision as default type; the meta device stands in for it."""
    n = torch.tensor([8, 3, 2])
    expected = weights.of(setting(3, class_counts=lambda: n))
    loss = ClassWeighted(CrossEntropy(), weights)
    given = setting(3, class_counts=lambda: n)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            loss.prepare(given)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(loss.w.values_V, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrequencyPower(-1.0), "gamma must be at least 0, got -1.0"),
        (lambda: FrequencyPower(cap=0.5), "cap must be at least 1, the mean of the weights, got 0.5"),
        (lambda: EffectiveNumber(1.0), r"beta must be in \[0, 1\), got 1.0"),
        (lambda: EffectiveNumber(cap=float("nan")), "cap must be at least 1"),
    ],
)
def test_numbers_out_of_range(make: type, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_it_is_written_in_yaml_by_short_names() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--losses", type=dict[str, TokenLoss])
    text = """
kd:
  class_path: ClassWeighted
  init_args:
    term: {class_path: ForwardKL, init_args: {temperature: 2.0}}
    class_weights: {class_path: EffectiveNumber, init_args: {beta: 0.99, cap: null}}
"""
    loss = parser.instantiate_classes(parser.parse_object({"losses": yaml.safe_load(text)})).losses["kd"]
    assert isinstance(loss, ClassWeighted)
    assert isinstance(loss.term, ForwardKL)
    assert isinstance(loss.class_weights, EffectiveNumber)
    assert (loss.term.T, loss.class_weights.beta) == (2.0, 0.99)
    assert loss.class_weights.cap is None
