"""Bits by sensitivity: what is measured, and the choice against every possible one."""

import itertools
import random

import pytest

from distill.compress.sensitivity import UNITS, assign, average, increases_alone, monotone
from distill.types import ConfigError

CHOICES = (2, 3, 4, 8)


def brute_force(costs: dict[str, dict[int, float]], sizes: dict[str, int], budget: float) -> float:
    """The least sum of losses over all assignments that fit."""
    fitting = (
        chosen
        for chosen in itertools.product(*(costs[name] for name in costs))
        if sum(sizes[name] * bits for name, bits in zip(costs, chosen, strict=True)) <= budget * sum(sizes.values()) + 1e-9
    )
    return min(sum(costs[name][bits] for name, bits in zip(costs, chosen, strict=True)) for chosen in fitting)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"layer{i}" for i in range(5)]
    costs = {name: monotone({bits: rng.random() / bits for bits in CHOICES}) for name in names}
    sizes = {name: rng.choice([64, 96, 4096, 11008]) for name in names}
    budget = rng.uniform(2.0, 6.0)
    chosen = assign(costs, sizes, budget)
    assert list(chosen) == names
    assert average(chosen, sizes) <= budget + 1e-9
    assert sum(costs[name][bits] for name, bits in chosen.items()) == pytest.approx(brute_force(costs, sizes, budget), abs=1e-12)


def test_the_sensitive_layer_keeps_its_bits() -> None:
    costs = {"first": {2: 5.0, 4: 1.0, 8: 0.0}, "second": {2: 0.1, 4: 0.01, 8: 0.0}, "third": {2: 0.2, 4: 0.02, 8: 0.0}}
    sizes = dict.fromkeys(costs, 100)
    assert assign(costs, sizes, 4.0) == {"first": 8, "second": 2, "third": 2}
    assert assign(costs, sizes, 8.0) == {"first": 8, "second": 8, "third": 8}
    assert assign(costs, sizes, 2.0) == {"first": 2, "second": 2, "third": 2}


def test_sizes_without_a_common_divisor_keep_the_budget() -> None:
    rng = random.Random(0)
    sizes = {f"layer{i}": rng.randrange(10**8, 10**9) | 1 for i in range(6)}
    costs = {name: {bits: rng.random() * 2.0**-bits for bits in CHOICES} for name in sizes}
    for budget in (2.0, 2.5, 4.0):
        chosen = assign(costs, sizes, budget)
        assert average(chosen, sizes) <= budget
        found = sum(monotone(costs[name])[bits] for name, bits in chosen.items())
        assert found <= brute_force(costs, sizes, budget - 20 / UNITS if budget > 2 else 2.0) + 1e-12


def test_more_bits_never_cost_more() -> None:
    assert monotone({4: 0.3, 2: 0.5, 3: 0.2, 8: -0.1}) == {2: 0.5, 3: 0.2, 4: 0.2, 8: -0.1}
    assert assign({"noisy": {2: 0.1, 4: 0.2}}, {"noisy": 10}, 4.0) == {"noisy": 2}, "no bits for nothing"


def test_a_budget_below_the_fewest_bits() -> None:
    with pytest.raises(ConfigError, match=r"budget is 2\.5 bits a weight, but the fewest that can be chosen are 3"):
        assign({"a": {3: 0.1, 4: 0.0}}, {"a": 7}, 2.5)


def test_each_layer_is_measured_alone() -> None:
    costs = {(None, 0): 3.0, ("a", 2): 5.0, ("a", 4): 3.5, ("b", 2): 4.0, ("b", 4): 2.75}
    assert increases_alone(["a", "b"], (2, 4), lambda *which: costs[which]) == {"a": {2: 2.0, 4: 0.5}, "b": {2: 1.0, 4: -0.25}}
