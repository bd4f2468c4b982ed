from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from distill.metrics.bootstrap import Resampler
from distill.metrics.temperature import ONE, TEMPERATURES, at, best, fitted, scaled
from distill.types import DataError


def model(n: int, classes: int, T: float, seed: int = 0) -> tuple[Any, Any]:
    """Logits that are T times too large, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return T * logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def nll(logits: Any, labels: Any, T: float) -> Any:
    return -log_softmax(logits.double().numpy() / T, axis=1)[np.arange(len(labels)), labels.numpy()]


def optimum(logits: Any, labels: Any) -> float:
    return float(minimize_scalar(lambda T: nll(logits, labels, T).mean(), bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6}).x)


def test_the_grid_is_even_in_log_and_holds_1() -> None:
    assert TEMPERATURES[[0, ONE, -1]].tolist() == [0.25, 1.0, 4.0]
    np.testing.assert_allclose(np.diff(np.log(TEMPERATURES)), np.log(4) / ONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_is_the_softmax_at_each_temperature(dtype: Any) -> None:
    logits, labels = model(50, 30, 5.0)
    logits = (logits + 300).to(dtype)
    found = scaled(logits, labels)
    assert (found.shape, found.dtype) == ((50, 2, len(TEMPERATURES)), torch.float32)
    for k, T in enumerate(TEMPERATURES):
        logp = log_softmax(logits.double().numpy() / T, axis=1)
        np.testing.assert_allclose(found[:, 0, k], -logp[np.arange(50), labels], rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(found[:, 1, k], np.exp(logp.max(1)), rtol=1e-5)


def test_classes_that_cannot_be_and_the_logits_given_stay_as_they_are() -> None:
    logits, labels = model(20, 6, 1.0)
    padded = torch.cat([logits, torch.full((20, 3), -torch.inf)], 1)
    before = padded.clone()
    torch.testing.assert_close(scaled(padded, labels), scaled(logits, labels))
    assert torch.equal(padded, before)


@pytest.mark.parametrize("T", [0.3, 0.7, 1.0, 1.37, 3.6])
def test_the_fitted_temperature_is_the_optimum(T: float) -> None:
    logits, labels = model(3000, 10, T)
    found = fitted(Resampler(np.arange(3000)), scaled(logits, labels).numpy())
    assert found.temperature.value == pytest.approx(optimum(logits, labels), rel=3e-3)
    assert not found.edge


def test_the_interval_is_that_of_fits_on_resampled_rows() -> None:
    logits, labels = model(300, 5, 1.5)
    rows = np.repeat(np.arange(100), 3)
    found = fitted(Resampler(rows, seed=4, resamples=60), scaled(logits, labels).numpy()).temperature
    generator, fits = np.random.default_rng(4), []
    for _ in range(60):
        drawn = (3 * generator.integers(0, 100, 100)[:, None] + np.arange(3)).ravel()
        fits.append(optimum(logits[drawn], labels[drawn]))
    expected = Resampler(rows).interval(0.0, np.array(fits))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=5e-3)


def test_the_interval_covers_the_true_temperature() -> None:
    resampler, hits = Resampler(np.arange(270), resamples=500), 0
    for seed in range(120):
        found = fitted(resampler, scaled(*model(270, 5, 1.5, seed)).numpy()).temperature
        hits += found.low <= 1.5 <= found.high
    assert 0.89 * 120 <= hits <= 0.995 * 120  # 95 %, give or take what chance does to 120


def test_each_half_of_the_rows_has_the_temperature_of_the_other() -> None:
    logits, labels = model(400, 5, 2.0)
    rows = np.repeat(np.arange(100) * 7, 4)  # numbers need not follow each other: positions are a sample
    logits[(rows // 7) % 2 == 1] /= 1.6  # so that the halves differ
    found = fitted(Resampler(rows), scaled(logits, labels).numpy())
    odd = torch.from_numpy((rows // 7) % 2 == 1)
    for half in (odd, ~odd):
        T = optimum(logits[~half], labels[~half])
        np.testing.assert_allclose(found.nll[half], nll(logits[half], labels[half], T), rtol=0.02, atol=0.01)
        expected = (logits[half] / T).softmax(-1).amax(-1)
        np.testing.assert_allclose(found.confidence[half], expected, atol=0.01)
    assert found.nll.mean() > nll(logits, labels, optimum(logits, labels)).mean()


def test_a_temperature_between_those_of_the_grid() -> None:
    logits, labels = model(200, 10, 1.0)
    table = scaled(logits, labels).numpy()
    for T in (0.25, 0.26, 0.9, 1.0, 1.045, 3.9, 4.0):
        found = at(table, T)
        np.testing.assert_allclose(found[:, 0], nll(logits, labels, T), atol=5e-3, rtol=1e-3)
        np.testing.assert_allclose(found[:, 1], (logits / T).softmax(-1).amax(-1), atol=1e-3)


@pytest.mark.parametrize(("T", "edge"), [(12.0, 4.0), (0.05, 0.25)])
def test_beyond_the_grid_its_edge_is_given_and_said_to_be_one(T: float, edge: float) -> None:
    logits, labels = model(500, 10, T)
    found = fitted(Resampler(np.arange(500)), scaled(logits, labels).numpy())
    assert found.edge
    assert (found.temperature.value, found.temperature.low, found.temperature.high) == (edge, edge, edge)
    np.testing.assert_allclose(found.nll, nll(logits, labels, edge), rtol=1e-4, atol=1e-4)


def test_the_minimum_of_a_parabola_is_exact() -> None:
    log_t = np.log(TEMPERATURES)
    minima = np.array([-1.1, -0.3, 0.0, 0.04, 1.2])
    curves = 3 + (log_t - minima[:, None]) ** 2
    np.testing.assert_allclose(best(curves), np.exp(minima), rtol=1e-9)
    assert best(curves[2]).item() == pytest.approx(1.0)
    assert best(np.ones(len(TEMPERATURES))).item() == 0.25  # nothing to choose between


def test_a_label_with_probability_0_has_no_temperature() -> None:
    logits, labels = model(20, 6, 1.0)
    logits[3, labels[3]] = -torch.inf
    with pytest.raises(DataError, match="infinite"):
        fitted(Resampler(np.arange(20)), scaled(logits, labels).numpy())
