import numpy as np
import pytest

from distill.teachers.store.scale import Scale


@pytest.mark.parametrize("bits", [8, 16])
def test_fourth_roots_are_at_most_half_a_step_off(bits: int) -> None:
    p = np.exp(-np.random.default_rng(0).uniform(0, 4 * np.log(2**bits - 1), 10_000)).astype(np.float32)
    scale = Scale(bits)
    off = np.abs(scale.probs(scale.levels(p)).astype(float) ** 0.25 - p.astype(float) ** 0.25)
    assert off.max() <= 0.5 / (2**bits - 1) * (1 + 1e-4)
    assert off.max() > 0.45 / (2**bits - 1)


@pytest.mark.parametrize(
    ("p", "bits", "off"),
    [(0.5, 8, 9.4e-3), (0.01, 8, 2.5e-2), (1e-4, 8, 8.1e-2), (1e-6, 8, 0.28), (0.01, 16, 1e-4), (1e-4, 16, 3.1e-4), (1e-6, 16, 1e-3)],
)
def test_relative_errors_are_as_small_as_said(p: float, bits: int, off: float) -> None:
    near, scale = (p * np.linspace(0.7, 1.4, 5000)).astype(np.float32), Scale(bits)
    found = np.abs(scale.probs(scale.levels(near)) / near - 1)
    assert found[np.abs(near / p - 1) < 0.02].max() <= off * 1.02


@pytest.mark.parametrize("bits", [8, 16])
def test_nothing_and_all_are_exact_and_little_is_not_nothing(bits: int) -> None:
    scale = Scale(bits)
    assert scale.probs(scale.levels(np.array([0, 1, 1 + 1e-6], np.float32))).tolist() == [0, 1, 1]
    assert (scale.probs(scale.levels(np.array([1e-15, 1e-30, 1e-42], np.float32))) > 0).all()


def test_levels_rise_with_probabilities() -> None:
    scale = Scale(8)
    assert scale.levels(scale.values).tolist() == list(range(256))
