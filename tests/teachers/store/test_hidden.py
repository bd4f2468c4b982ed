import numpy as np
import pytest

from distill.teachers.store import hidden
from distill.teachers.store.planes import Packer, Unpacker
from distill.types import DataError


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_states_are_at_most_half_a_step_off(dtype: type) -> None:
    states = (np.random.default_rng(0).normal(size=(20, 33)) * np.logspace(-3, 2, 20)[:, None]).astype(dtype)
    states[7] = 0
    packer = Packer()
    hidden.put(packer, "layers.1", states)
    found = hidden.take(Unpacker(packer.bytes()), 20, 33)
    assert found.dtype == np.float32
    step = np.abs(states.astype(float)).max(1, keepdims=True) / 127
    assert (np.abs(found - states.astype(float)) <= step * 0.50001).all()
    assert not found[7].any()


def test_no_positions() -> None:
    packer = Packer()
    hidden.put(packer, "a", np.zeros((0, 4), np.float32))
    assert hidden.take(Unpacker(packer.bytes()), 0, 4).shape == (0, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"layers\.1.*not finite"):
        hidden.put(Packer(), "layers.1", np.array([[0.0, value]], np.float32))
