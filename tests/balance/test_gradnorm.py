import math
from typing import Any

import pytest

from distill.balance.base import Measured
from distill.balance.gradnorm import GradNorm, NormEqualisation
from distill.types import ConfigError

settings_GradNorm = [  # noqa: N816
    {},
    {"shares": {"ce": 1, "kd": 3, "feat": 0.5}, "smoothing": 0.0},
    {"shares": {"ce": 1, "kd": 3, "feat": 0}, "alpha": 1.5},
    {"min": 0.5, "max": 1.5, "alpha": 0.5},
    {"every": 5, "exact_every": 10, "alpha": 0.12},
]
settings_NormEqualisation = [{}, {"smoothing": 0.0}, {"every": 4, "min": 0.1, "max": 2.0}]  # noqa: N816


def seen(norms: dict[str, float], losses: dict[str, float] | None = None) -> Measured:
    return Measured(losses or dict.fromkeys(norms, 1.0), norms)


def started(names: str = "ce kd", **given: Any) -> GradNorm:
    balancer = GradNorm(**given)
    balancer.start(names.split())
    return balancer


def weights(balancer: GradNorm | NormEqualisation, names: str = "ce kd") -> list[float]:
    return list(balancer.weights(names.split()).values())


def by_the_paper(norms: list[float], rates: list[float], alpha: float) -> list[float]:
    """Algorithm 1 of arXiv 1711.02257 with constant gradients: descent on `Σ_i |w_i g_i − mean_j(w_j g_j) r_i^α|`, then renormalise."""
    count, mean_rate = len(norms), sum(rates) / len(rates)
    w = [1.0] * count
    for _ in range(10000):
        mean = sum(a * b for a, b in zip(w, norms, strict=True)) / count
        signs = [math.copysign(1, w[i] * norms[i] - mean * (rates[i] / mean_rate) ** alpha) for i in range(count)]
        w = [w[i] - 2e-4 * signs[i] * norms[i] for i in range(count)]
        w = [value * count / sum(w) for value in w]
    return w


def test_one_each_before_anything_is_measured() -> None:
    assert GradNorm().weights(["ce", "kd"]) == {"ce": 1.0, "kd": 1.0}
    assert weights(started(shares={"ce": 1, "kd": 9})) == [1.0, 1.0]


def test_equal_shares_by_hand() -> None:
    balancer = started()
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))  # taken as it is, in spite of the smoothing
    assert weights(balancer) == pytest.approx([1.6, 0.4])  # 1/2 : 1/8, summing to 2; both gradients weigh 3.2


def test_shares_by_hand() -> None:
    balancer = started(shares={"ce": 1, "kd": 3})
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))
    assert weights(balancer) == pytest.approx([8 / 7, 6 / 7])  # weighted norms 16/7 : 48/7


def test_shares_are_met() -> None:
    shares = {"ce": 0.2, "kd": 0.5, "feat": 0.3}
    balancer = started("ce kd feat", shares=shares, smoothing=0.0)
    for norms in ({"ce": 3.0, "kd": 0.01, "feat": 7.0}, {"ce": 0.4, "kd": 0.3, "feat": 1.1}):
        balancer.update(seen(norms))
        w = balancer.weights(list(norms))
        pull = {name: w[name] * norms[name] for name in norms}
        assert {name: pull[name] / sum(pull.values()) for name in pull} == pytest.approx(shares)
        assert sum(w.values()) == pytest.approx(3)


@pytest.mark.parametrize(("alpha", "ratio"), [(0.0, 1.0), (0.5, math.sqrt(2)), (1.0, 2.0), (2.0, 4.0)])
def test_inverse_training_rate_by_hand(alpha: float, ratio: float) -> None:
    balancer = started(alpha=alpha, smoothing=0.0)
    balancer.update(seen({"ce": 1.0, "kd": 1.0}, {"ce": 4.0, "kd": 8.0}))
    assert weights(balancer) == pytest.approx([1, 1])
    balancer.update(seen({"ce": 1.0, "kd": 1.0}, {"ce": 2.0, "kd": 2.0}))  # 1/2 and 1/4 of the first losses
    assert weights(balancer) == pytest.approx([2 * ratio / (1 + ratio), 2 / (1 + ratio)])


@pytest.mark.parametrize(("norms", "rates", "alpha"), [([2.0, 0.5, 1.0], [1, 1, 1], 0.0), ([0.6, 1.5], [0.9, 0.5], 1.0)])
def test_is_where_the_gradient_steps_of_the_paper_lead(norms: list[float], rates: list[float], alpha: float) -> None:
    names = ["a", "b", "c"][: len(norms)]
    balancer = started(" ".join(names), alpha=alpha, smoothing=0.0)
    balancer.update(seen(dict.fromkeys(names, 1.0)))
    balancer.update(seen(dict(zip(names, norms, strict=True)), dict(zip(names, rates, strict=True))))
    assert list(balancer.weights(names).values()) == pytest.approx(by_the_paper(norms, rates, alpha), abs=2e-3)


def test_smoothing_by_hand() -> None:
    balancer = started(smoothing=0.5)
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))
    balancer.update(seen({"ce": 5.0, "kd": 5.0}))  # target 1 : 1, half way from 4 : 1 is 2 : 1
    assert weights(balancer) == pytest.approx([4 / 3, 2 / 3])


def test_a_step_without_norms_moves_nothing() -> None:
    balancer = started()
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))
    balancer.update(Measured({"ce": 0.1, "kd": 9.0}))
    assert weights(balancer) == pytest.approx([1.6, 0.4])


def test_cut_after_normalising() -> None:
    balancer = started(min=0.5, max=1.4, smoothing=0.5)
    balancer.update(seen({"ce": 1.0, "kd": 1e9}))
    assert weights(balancer) == [1.4, 0.5]
    balancer.update(seen({"ce": 1.0, "kd": 1.0}))  # goes on from the cut weights: √1.4 : √0.5
    left = math.sqrt(1.4) / (math.sqrt(1.4) + math.sqrt(0.5))
    assert weights(balancer) == pytest.approx([2 * left, 2 * (1 - left)])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -1.0])
def test_an_unusable_norm_leaves_its_weight(bad: float) -> None:
    balancer = started("ce kd feat", smoothing=0.0)
    balancer.update(seen({"ce": 1.0, "kd": 2.0, "feat": 4.0}))
    assert weights(balancer, "ce kd feat") == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    balancer.update(seen({"ce": 3.0, "kd": bad, "feat": 3.0}))  # the others share 3 − 6/7
    assert weights(balancer, "ce kd feat") == pytest.approx([15 / 14, 6 / 7, 15 / 14])


def test_a_term_measured_late_takes_its_target_at_once() -> None:
    balancer = started(smoothing=0.9)
    balancer.update(seen({"ce": 5.0, "kd": 0.0}))
    assert weights(balancer) == pytest.approx([1, 1])
    balancer.update(seen({"ce": 3.0, "kd": 1.0}))  # targets 0.5 and 1.5; ce comes from 1: 0.5 ** 0.1 : 1.5
    left = 0.5**0.1 / (0.5**0.1 + 1.5)
    assert weights(balancer) == pytest.approx([2 * left, 2 * (1 - left)])


def test_cuts_that_leave_nothing_to_share_give_the_minimum() -> None:
    balancer = started("ce kd feat", min=0.9, max=2.5, smoothing=0.0)
    balancer.update(seen({"ce": 1e-9, "kd": 1.0, "feat": 1.0}))
    assert weights(balancer, "ce kd feat") == [2.5, 0.9, 0.9]
    balancer.update(seen({"ce": 0.0, "kd": 0.0, "feat": 1e-3}))  # 3 − 2.5 − 0.9 < 0 is left
    assert weights(balancer, "ce kd feat") == pytest.approx([2.5, 0.9, 0.9])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_losses_matter_only_with_alpha(bad: float) -> None:
    for alpha, expected in ((0.0, [0.4, 1.6]), (1.0, [1.6, 0.4])):
        balancer = started(alpha=alpha, smoothing=0.0)
        balancer.update(seen({"ce": 2.0, "kd": 8.0}))
        balancer.update(seen({"ce": 8.0, "kd": 2.0}, {"ce": bad, "kd": 1.0}))
        assert weights(balancer) == pytest.approx(expected)


def test_the_first_loss_is_the_first_usable_one() -> None:
    balancer = started(alpha=1.0, smoothing=0.0)
    balancer.update(seen({"ce": 1.0, "kd": 1.0}, {"ce": 1.0, "kd": 0.0}))
    balancer.update(seen({"ce": 1.0, "kd": 1.0}, {"ce": 1.0, "kd": 4.0}))
    balancer.update(seen({"ce": 1.0, "kd": 1.0}, {"ce": 1.0, "kd": 2.0}))  # rates 1 and 2/4
    assert weights(balancer) == pytest.approx([4 / 3, 2 / 3])


def test_a_share_of_zero_is_as_if_the_term_were_not_there() -> None:
    balancer = started("ce kd feat", shares={"ce": 1, "kd": 1, "feat": 0})
    assert weights(balancer, "ce kd feat") == [1.0, 1.0, 0.0]
    balancer.update(seen({"ce": 2.0, "kd": 8.0, "feat": 5.0}))
    assert weights(balancer, "ce kd feat") == pytest.approx([1.6, 0.4, 0.0])


def test_a_restart_keeps_the_weights() -> None:
    balancer = started()
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))
    balancer.start(["ce", "kd"])
    assert weights(balancer) == pytest.approx([1.6, 0.4])


def test_when_it_measures() -> None:
    balancer = GradNorm(every=3, exact_every=4)
    assert [step for step in range(9) if balancer.wants_norms(step)] == [0, 3, 4, 6, 8]
    assert [step for step in range(9) if balancer.wants_gram(step)] == [0, 4, 8]
    assert [step for step in range(500) if GradNorm().wants_gram(step)] == [0, 200, 400]
    assert not any(GradNorm(exact_every=0).wants_gram(step) for step in range(9))
    assert [step for step in range(9) if NormEqualisation(every=4).wants_norms(step)] == [0, 4, 8]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"ce": 1}, r"model\.balancer\.shares: unknown \[\], missing \['kd'\]"),
        ({"ce": 1, "kd": 1, "dk": 1}, r"model\.balancer\.shares: unknown \['dk'\], missing \[\]"),
        ({"ce": 1, "kd": -1}, r"model\.balancer\.shares: \{'kd': -1\} must be finite and ≥ 0"),
        ({"ce": 1, "kd": math.nan}, r"model\.balancer\.shares: \{'kd': nan\}"),
        ({"ce": 0, "kd": 0}, r"model\.balancer\.shares.*gives no term a share"),
        ({}, r"model\.balancer\.shares.*gives no term a share"),
        ({"ce": 1, "kd": 0}, r"at least two terms .* got \['ce'\].*FixedWeights"),
    ],
)
def test_wrong_shares_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started(shares=shares)


def test_one_term_is_refused_with_the_fix() -> None:
    for balancer in (GradNorm(), NormEqualisation()):
        with pytest.raises(ConfigError, match=rf"{type(balancer).__name__} balances at least two terms.*got \['kd'\].*use FixedWeights"):
            balancer.start(["kd"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"smoothing": 1.0}, r"model\.balancer\.smoothing must be in \[0, 1\), got 1\.0"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"min": 0.0}, "want 0 < min ≤ max"),
        ({"min": 2.0, "max": 1.0}, "got min 2.0 and max 1.0"),
        ({"max": math.inf}, "both finite"),
        ({"every": 0}, "want every ≥ 1"),
        ({"exact_every": -1}, "exact_every ≥ 0"),
    ],
)
def test_arguments_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    for cls in (GradNorm, NormEqualisation):
        with pytest.raises(ConfigError, match=message):
            cls(**given)


@pytest.mark.parametrize("alpha", [-1.0, math.inf, math.nan])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.balancer\.alpha"):
        GradNorm(alpha=alpha)


def equalising(names: str = "ce kd", **given: Any) -> NormEqualisation:
    balancer = NormEqualisation(**given)
    balancer.start(names.split())
    return balancer


def test_equalised_by_hand() -> None:
    balancer = equalising()
    assert weights(balancer) == [1.0, 1.0]
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))
    assert weights(balancer) == pytest.approx([2.5, 0.625])  # both gradients weigh 5, together 10 as before


def test_equalised_smoothing_by_hand() -> None:
    balancer = equalising(smoothing=0.5)
    balancer.update(seen({"ce": 2.0, "kd": 8.0}))
    balancer.update(seen({"ce": 5.0, "kd": 5.0}))
    assert weights(balancer) == pytest.approx([math.sqrt(2.5), math.sqrt(0.625)])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_equalised_leaves_a_term_with_an_unusable_norm_out_of_the_mean(bad: float) -> None:
    balancer = equalising("ce kd feat", smoothing=0.0)
    balancer.update(seen({"ce": 2.0, "kd": bad, "feat": 8.0}))
    assert weights(balancer, "ce kd feat") == pytest.approx([2.5, 1.0, 0.625])


def test_equalised_is_cut() -> None:
    balancer = equalising(min=0.1, max=20.0)
    balancer.update(seen({"ce": 1e-3, "kd": 1e3}))
    assert weights(balancer) == [20.0, pytest.approx(0.5)]
    balancer = equalising("ce kd feat", min=0.6, max=20.0)
    balancer.update(seen({"ce": 1e-3, "kd": 1e3, "feat": 1.0}))
    assert weights(balancer, "ce kd feat") == [20.0, 0.6, 20.0]
