"""One mill for every balancer: whatever class is found in `distill.balance` must give usable weights, whatever is measured.

A new balancer needs nothing here. In `tests/balance/test_<its file>.py` may stand
- `settings_<ClassName>`, a list of dictionaries of constructor arguments to try, for terms named `ce`, `kd` and `feat`;
- `needs_<ClassName>`, a function of such arguments that gives the packages without which they are skipped.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import distill.balance
from distill.balance.base import Balancer, Measured
from distill.balance.fixed import FixedWeights
from distill.types import ConfigError

NAMES = ["ce", "kd", "feat"]
BAD_NORMS = (0.0, math.inf, math.nan, 1e-30, 1e30)
BAD_LOSSES = (0.0, -3.0, math.nan, math.inf, -math.inf, 1e-30, 1e30)
assert distill.balance.__path__, "imported so that every balancer is defined"


def concrete(base: type[Balancer]) -> Iterator[type[Balancer]]:
    for cls in base.__subclasses__():
        yield from concrete(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("distill.balance."):
            yield cls


def beside(cls: type[Balancer], kind: str) -> Any:
    """Find `<kind>_<ClassName>` in the test of the file that holds the class, or None."""
    path = Path(__file__).parent / f"test_{cls.__module__.rsplit('.', 1)[1]}.py"
    return getattr(import_module(f"tests.balance.{path.stem}"), f"{kind}_{cls.__name__}", None) if path.exists() else None


BALANCERS = sorted(set(concrete(Balancer)), key=lambda cls: cls.__name__)  # type: ignore[type-abstract]
VARIANTS = [(cls, given) for cls in BALANCERS for given in beside(cls, "settings") or [{}]]

Make = Callable[..., Balancer]


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"{variant[0].__name__}-{','.join(variant[1])}")
def make(request: pytest.FixtureRequest) -> Make:
    """Make the balancer anew, and start it."""
    cls, given = request.param
    if needs := beside(cls, "needs"):
        for package in needs(**given):
            pytest.importorskip(package, reason=f"{package} is not installed, and is optional")

    def build(names: Sequence[str] = NAMES) -> Balancer:
        balancer: Balancer = cls(**given)
        balancer.start(names)
        return balancer

    return build


def measure(step: int, norms: dict[str, float] | None = None, losses: dict[str, float] | None = None) -> Measured:
    """Make up a step: norms and losses over two decades, and gradients that may conflict; some may be given."""
    rng = torch.Generator().manual_seed(step)
    drawn = (10 ** torch.empty(2, 3, dtype=torch.float64).uniform_(-1, 1, generator=rng)).tolist()
    lengths = dict(zip(NAMES, drawn[0], strict=True)) | (norms or {})
    directions = torch.nn.functional.normalize(torch.randn(3, 4, generator=rng, dtype=torch.float64))
    gradients = directions * torch.tensor([lengths[name] for name in NAMES], dtype=torch.float64)[:, None]
    return Measured(dict(zip(NAMES, drawn[1], strict=True)) | (losses or {}), lengths, gradients @ gradients.T)


def asked(balancer: Balancer, step: int, measured: Measured) -> Measured:
    """Leave out what the balancer did not ask for."""
    return replace(
        measured,
        norms=measured.norms if balancer.wants_norms(step) else {},
        gram=measured.gram if balancer.wants_gram(step) else None,
    )


def drive(balancer: Balancer, steps: Sequence[int], change: Callable[[Measured], Measured] = lambda measured: measured) -> list[Any]:
    """Take it through steps of made-up values; gives the weights after each."""
    weights = []
    for step in steps:
        balancer.update(asked(balancer, step, change(measure(step))))
        weights.append(balancer.weights(NAMES))
    return weights


def assert_usable(weights: dict[str, float]) -> None:
    assert list(weights) == NAMES
    assert all(type(value) is float and 0 <= value < math.inf for value in weights.values()), weights
    assert any(weights.values()), "nothing is trained on"


def test_every_balancer_is_found() -> None:
    assert {"FixedWeights", "GradNorm", "NormEqualisation", "LossRatio", "Uncertainty", "JacobianAggregator"} <= {
        cls.__name__ for cls in BALANCERS
    }


def test_gives_one_usable_weight_per_term(make: Make) -> None:
    balancer = make()
    assert_usable(balancer.weights(NAMES))
    for weights in drive(balancer, range(25)):
        assert_usable(weights)


def test_survives_whatever_is_measured(make: Make) -> None:
    pairs = [(norm, 1.0) for norm in BAD_NORMS] + [(1.0, loss) for loss in BAD_LOSSES] + [(math.nan, math.nan), (1e30, 1e-30)]
    for (norm, loss), victims in product(pairs, (["kd"], ["ce", "feat"], NAMES)):
        norms, losses = dict.fromkeys(victims, norm), dict.fromkeys(victims, loss)
        for before in (0, 3):  # bad from the first measurement on, and later
            balancer = make()
            drive(balancer, range(before))
            for step in (0, 1, 10, 20):
                balancer.update(asked(balancer, step, measure(step, norms, losses)))
                assert_usable(balancer.weights(NAMES))
            for weights in drive(balancer, range(30, 33)):
                assert_usable(weights)


def test_is_deterministic_and_draws_no_random_numbers(make: Make) -> None:
    before = torch.get_rng_state()
    first = drive(make(), range(25))
    assert torch.equal(torch.get_rng_state(), before), "ranks would part"
    torch.rand(1)
    assert drive(make(), range(25)) == first


@pytest.mark.parametrize("start_first", [True, False])
def test_resumes_where_it_was(make: Make, start_first: bool) -> None:
    balancer = make()
    drive(balancer, range(13))
    state, there = balancer.state_dict(), balancer.weights(NAMES)
    later = drive(balancer, range(13, 33))  # must not reach into the state that was given
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    if not start_first:
        resumed.start(NAMES)
    assert resumed.weights(NAMES) == there
    assert drive(resumed, range(13, 33)) == later


def test_refuses_a_single_term(make: Make) -> None:
    if isinstance(make(), FixedWeights):
        make(["kd"])
    else:
        with pytest.raises(ConfigError, match=r"model\.balancer"):
            make(["kd"])


def test_knows_terms_by_name(make: Make) -> None:
    def permuted(measured: Measured) -> Measured:
        assert measured.gram is not None
        return Measured(
            {name: measured.losses[name] for name in names}, {name: measured.norms[name] for name in names}, measured.gram[order][:, order]
        )

    order = [2, 0, 1]
    names = [NAMES[i] for i in order]
    for one, other in zip(drive(make(names), range(25), permuted), drive(make(), range(25)), strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_the_unit_of_the_gradients_does_not_matter(make: Make) -> None:
    def scaled(measured: Measured) -> Measured:
        assert measured.gram is not None
        return replace(measured, norms={name: 1e-4 * norm for name, norm in measured.norms.items()}, gram=1e-8 * measured.gram)

    for one, other in zip(drive(make(), range(25), scaled), drive(make(), range(25)), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
