import numpy as np
import pytest
import torch

from distill.metrics import speculative
from distill.metrics.speculative import acceptance, best_gamma, speed_up, tokens_along_text, tokens_per_call

P, Q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.4, 0.2, 0.3])


def decode(rng: np.random.Generator, gamma: int, p: list[np.ndarray], q: list[np.ndarray]) -> list[int]:
    """One round of Algorithm 1 of the paper, as it is: draft γ tokens, let the teacher accept or correct. Position i has p[i] and q[i]."""
    tokens = []
    for i in range(gamma):
        drafted = rng.choice(len(q[i]), p=q[i])
        if rng.random() > p[i][drafted] / q[i][drafted]:
            rest = np.maximum(p[i] - q[i], 0)
            return [*tokens, int(rng.choice(len(rest), p=rest / rest.sum()))]
        tokens.append(int(drafted))
    return [*tokens, int(rng.choice(len(p[gamma]), p=p[gamma]))]


def test_acceptance_by_hand() -> None:
    q, p = torch.tensor(np.stack([Q, Q])), torch.tensor(np.stack([P, Q]))
    np.testing.assert_allclose(acceptance(q, p), [0.1 + 0.3 + 0.2 + 0.0, 1.0])
    np.testing.assert_allclose(acceptance(q, p)[0], 1 - np.abs(P - Q).sum() / 2)  # Corollary 3.6


@pytest.mark.parametrize("gamma", [1, 4])
def test_acceptance_and_tokens_are_those_of_simulated_decoding(gamma: int) -> None:
    rng, rounds = np.random.default_rng(0), 6000
    made = [decode(rng, gamma, [P] * (gamma + 1), [Q] * (gamma + 1)) for _ in range(rounds)]
    alpha = acceptance(torch.tensor(Q)[None], torch.tensor(P)[None]).item()
    first = np.bincount([tokens[0] for tokens in made], minlength=4) / rounds
    np.testing.assert_allclose(first, P, atol=0.03)  # the simulation is right: it samples from the teacher
    lengths = np.array([len(tokens) for tokens in made])
    assert (lengths > 1).mean() == pytest.approx(alpha, abs=0.03)
    assert lengths.mean() == pytest.approx(tokens_per_call(alpha, gamma), abs=4 * lengths.std() / rounds**0.5)


def test_products_along_the_text_are_those_of_simulated_decoding_where_positions_differ() -> None:
    rng, gamma, rounds = np.random.default_rng(1), 3, 5000
    ps = [P, Q, P, P]
    qs = [Q, Q, Q, P]  # accepted with 0.6, 1, 0.6
    mean = np.mean([len(decode(rng, gamma, ps, qs)) for _ in range(rounds)])
    betas = acceptance(torch.tensor(np.stack(qs[:3])), torch.tensor(np.stack(ps[:3]))).numpy()
    found = tokens_along_text(betas, np.zeros(3, np.int64), 3)
    assert found[3] == pytest.approx(1 + 0.6 + 0.6 + 0.36)
    assert mean == pytest.approx(found[3], abs=0.07)
    assert abs(tokens_per_call(betas.mean(), 3) - found[3]) > 0.1  # as if all were alike it would be another figure


@pytest.mark.parametrize(
    ("alpha", "gamma", "times"), [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71), (0.9, 10, 6.86)]
)
def test_table_1_of_the_paper(alpha: float, gamma: int, times: float) -> None:
    assert speed_up(alpha, gamma, cost=0.0) == pytest.approx(times, abs=0.005)


def test_the_ends() -> None:
    np.testing.assert_allclose(tokens_per_call([0.0, 0.5, 1.0], 2), [1, 1.75, 3])
    np.testing.assert_allclose(tokens_per_call(1 - 1e-9, np.arange(5)), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(speed_up([0.0, 0.5, 1.0], 0, 0.3), 1)
    assert speed_up(0.5, 2, 0.25) == pytest.approx(1.75 / 1.5)


def test_best_gamma() -> None:
    assert best_gamma(0.1, 0.2) == 0  # drafting costs more than it gives
    assert best_gamma(0.2, 0.1) > 0  # Corollary 3.9: it pays where α > c
    assert best_gamma(1.0, 0.1) == speculative.MOST
    for alpha in (0.3, 0.6, 0.9):
        times = [sum(alpha**i for i in range(gamma + 1)) / (0.05 * gamma + 1) for gamma in range(33)]
        assert best_gamma(alpha, 0.05) == times.index(max(times))


def test_along_text_follows_rows_and_says_nothing_beyond_them() -> None:
    rng = np.random.default_rng(0)
    betas, rows = rng.random(20), np.repeat([0, 1, 3], [9, 2, 9])
    windows = [(s, s + 3) for s in range(18) if len(set(rows[s : s + 3])) == 1]
    assert len(windows) == 14
    true = [1.0] + [np.mean([1 + sum(np.prod(betas[s : s + i]) for i in range(1, g + 1)) for s, _ in windows]) for g in (1, 2, 3)]
    np.testing.assert_allclose(tokens_along_text(betas, rows, 3), true)
    np.testing.assert_array_equal(tokens_along_text(betas, rows, 10), [1.0] + [np.nan] * 10)
    np.testing.assert_array_equal(tokens_along_text(betas, rows, 30), [1.0] + [np.nan] * 30)
    alike = np.full(9, 0.7)
    np.testing.assert_allclose(tokens_along_text(alike, np.zeros(9, np.int64), 4), tokens_per_call(0.7, np.arange(5)))
