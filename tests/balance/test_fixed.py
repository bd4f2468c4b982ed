import math

import pytest

from distill.balance.fixed import FixedWeights
from distill.types import ConfigError


def test_one_where_none_is_set() -> None:
    assert FixedWeights().weights(["ce", "kd"]) == {"ce": 1.0, "kd": 1.0}
    assert FixedWeights({"kd": 0.3}).weights(["ce", "kd"]) == {"ce": 1.0, "kd": 0.3}


def test_zero_is_a_weight() -> None:
    assert FixedWeights({"ce": 0}).weights(["ce"]) == {"ce": 0.0}


def test_names_may_come_from_an_iterator() -> None:
    assert FixedWeights({"kd": 2.0}).weights(iter(["kd"])) == {"kd": 2.0}


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_negative_weight_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="the weight of 'kd' must be finite and ≥ 0, got"):
        FixedWeights({"kd": value})


def test_an_infinite_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="inf"):
        FixedWeights({"kd": math.inf})


def test_a_weight_for_no_term_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights for \['dk'\], but model.losses has \['ce', 'kd'\]"):
        FixedWeights({"dk": 1.0}).start(["ce", "kd"])
