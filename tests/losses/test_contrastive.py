import math

import pytest
import torch
from torch import Tensor

from distill.losses.contrastive import CRD, crd
from distill.types import ConfigError
from tests.losses.taps import Sample, count, labelled, make, mean_of

settings_CRD = [{"dim": 3, "temperature": 0.5}, {"dim": 4, "temperature": 0.07, "layers": [[0, 0], [2, 4]]}]  # noqa: N816


def reference_CRD(  # noqa: N802
    samples: list[Sample], parameters: dict[str, Tensor], temperature: float = 0.07, **_: object
) -> Tensor:
    """−1/S Σ_i [log h(t_i, s_i) + Σ_{j≠i} log(1 − h(t_j, s_i))], h = e^{t·s/τ} / (e^{t·s/τ} + N/M), N = S − 1, M = 37."""
    kept = labelled(samples)
    negatives = len(kept) - 1
    if negatives < 1:
        return torch.zeros((), dtype=torch.float64)

    def embed(side: str, i: int, x: Tensor) -> Tensor:
        y = parameters[f"{side}.{i}.weight"] @ x.mean(0) + parameters[f"{side}.{i}.bias"]
        return y / y.norm()

    def one(i: int) -> Tensor:
        s = [embed("projectors", i, sample.student[i]) for sample in kept]
        t = [embed("embeddings", i, sample.teacher[i].detach()) for sample in kept]
        value = torch.zeros((), dtype=torch.float64)
        for a, ours in enumerate(s):
            for b, theirs in enumerate(t):
                e = torch.exp(theirs.dot(ours) / temperature)
                h = e / (e + negatives / 37)
                value = value - (h.log() if a == b else (1 - h).log())
        return count(samples) * value / len(kept)

    return mean_of(samples, one)


def test_by_hand() -> None:
    # two orthogonal samples, τ = 1, N/M = 1/10: h of the pair e / (e + 0.1), of the others 1 / 1.1
    expected = -(math.log(math.e / (math.e + 0.1)) + math.log(1 - 1 / 1.1))
    assert crd(torch.eye(2), torch.eye(2), 1.0, 10).item() == pytest.approx(expected)


def test_it_falls_as_the_pairs_come_together() -> None:
    teacher = torch.eye(4)
    turned = torch.eye(4).roll(1, 0)
    assert crd(teacher, teacher, 0.1, 100) < crd(turned, teacher, 0.1, 100)


def test_low_temperatures_stay_finite() -> None:
    student = torch.eye(3).requires_grad_()
    value = crd(student, torch.eye(3).roll(1, 0), 1e-3, 10**9)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_both_embeddings_are_trained() -> None:
    loss = make(CRD, {"dim": 3})
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters()}
    assert shapes["projectors.0.weight"] == (3, 6)
    assert shapes["embeddings.0.weight"] == (3, 10)
    assert loss.summary() == ["student layer 2 ↔ teacher layer 4, linear 6→3 and 10→3"]


@pytest.mark.parametrize("given", [{"dim": 0}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_settings_that_cannot_work(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="want dim ≥ 1 and temperature > 0, got"):
        CRD(**given)  # type: ignore[arg-type]
