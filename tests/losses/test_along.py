"""The shortcut for targets that know a few classes: against autograd in float64, from the formula."""

import pytest
import torch
from torch import Tensor

from distill.losses.along import kl_to_known
from distill.losses.support import Distribution, Known

IDS = torch.tensor([[3, 0, 5], [1, 4, -1]])
PROBS = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.3, 0.0]], dtype=torch.float64)
FACTOR = 2.5


def by_autograd(logits: Tensor, probs: Tensor, tail: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`c Σ_bins p (log p − log q)`, position by position, with q_tail as the sum over the classes that are not known."""
    leaf = logits.clone().requires_grad_()
    values = []
    for n in range(len(leaf)):
        q, known = (leaf[n] / temperature).softmax(-1), [int(i) for i in IDS[n] if i >= 0]
        rest = [v for v in range(leaf.shape[1]) if v not in known]
        pairs = [(probs[n, k], q[v]) for k, v in enumerate(known)] + ([(tail[n], q[rest].sum())] if tail[n] > 0 else [])
        values.append(FACTOR * sum(p * (p / of_student).log() for p, of_student in pairs))
    total = torch.stack(values)
    return total.detach(), torch.autograd.grad(total.sum(), leaf)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("drawn", [False, True])
def test_value_and_gradient_are_those_of_the_formula(temperature: float, drawn: bool) -> None:
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tail = torch.zeros(2, dtype=torch.float64) if drawn else 1 - PROBS.sum(-1)
    probs = PROBS / PROBS.sum(-1, keepdim=True) if drawn else PROBS
    found = kl_to_known(Distribution(logits), Known(IDS, probs, tail, temperature, no_tail=drawn), temperature, FACTOR)
    assert found is not None
    factor = found.factor[:, None] if isinstance(found.factor, Tensor) else found.factor
    gradient = (factor * (logits / temperature).softmax(-1)).scatter_add(-1, found.ids, -found.amounts)
    values, expected = by_autograd(logits, probs, tail, temperature)
    torch.testing.assert_close(found.values, values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_student_with_next_to_nothing_in_the_tail_is_left_to_the_exact_way() -> None:
    logits = torch.full((2, 7), -20.0, dtype=torch.float64)
    logits[0, 3] = logits[1, 1] = 20.0
    assert kl_to_known(Distribution(logits), Known(IDS, PROBS, 1 - PROBS.sum(-1), 1.0), 1.0, FACTOR) is None


def test_the_probabilities_that_others_will_read_are_left_as_they_were() -> None:
    student = Distribution(torch.randn(2, 7, dtype=torch.float64))
    before = student.probs().clone()
    kl_to_known(student, Known(IDS, PROBS, 1 - PROBS.sum(-1), 1.0), 1.0, FACTOR)
    assert torch.equal(student.probs(), before)
