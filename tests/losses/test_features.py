from math import sqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.features import HiddenCKA, HiddenCosine, HiddenMSE, HiddenNormalized, hidden_cosine, hidden_normalized, linear_cka, unit
from distill.types import ConfigError
from tests.losses.taps import Sample, draw, evaluate, lay_out, make, mean_of

LAYERS = ([[0, 0], [1, -3]], "last")
settings_HiddenMSE = [  # noqa: N816
    {},
    {"layers": "last", "projector": "mlp"},
    {"layers": [["layers.0.up", "layers.3.mlp"], ["layers.0.mlp", "layers.0.mlp"]]},
]
settings_HiddenCosine = [{"layers": rule, "projector": "linear"} for rule in LAYERS]  # noqa: N816
settings_HiddenNormalized = [{"layers": rule} for rule in LAYERS]  # noqa: N816
settings_HiddenCKA = [{"layers": rule} for rule in ("uniform", "last")]  # noqa: N816


def project(parameters: dict[str, Tensor], i: int, x: Tensor) -> Tensor:
    """`W x`, or `W_2 GELU(W_1 x + b_1) + b_2` with `GELU(x) = x/2 (1 + erf(x/√2))`, or x where pair i has no parameters."""
    mine = {name.removeprefix(f"projectors.{i}."): p for name, p in parameters.items() if name.startswith(f"projectors.{i}.")}
    if "0.weight" in mine:
        inner = mine["0.weight"] @ x + mine["0.bias"]
        return mine["2.weight"] @ (inner / 2 * (1 + torch.erf(inner / sqrt(2)))) + mine["2.bias"]
    return mine["weight"] @ x if "weight" in mine else x


def _positions(samples: list[Sample], parameters: dict[str, Tensor], distance: object) -> Tensor:
    assert callable(distance)

    def one(i: int) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            for t, weight in enumerate(sample.weights()):
                value = value + weight * distance(project(parameters, i, sample.student[i][t]), sample.teacher[i][t].detach())
        return value

    return mean_of(samples, one)


def reference_HiddenMSE(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """The sum over positions of 1/D Σ_d (s_d − t_d)²."""
    return _positions(samples, parameters, lambda s, t: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s))


def reference_HiddenCosine(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """The sum over positions of 1 − s·t / (|s| |t|)."""
    return _positions(samples, parameters, lambda s, t: 1 - s.dot(t) / (s.dot(s) * t.dot(t)).sqrt())


def reference_HiddenNormalized(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """The sum over positions of 1/D Σ_d (n(s)_d − n(t)_d)², n(x) = (x − mean) / std."""

    def distance(s: Tensor, t: Tensor) -> Tensor:
        a, b = ((x - x.mean()) / ((x - x.mean()) ** 2).mean().sqrt() for x in (s, t))
        return ((a - b) ** 2).mean()

    return _positions(samples, parameters, distance)


def reference_HiddenCKA(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """1 − HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) times the number of labels; HSIC = tr(K H L H), K = X Xᵀ, H = W − w wᵀ with Σ w = 1."""
    weights = torch.tensor([w for s in samples for w in s.weights()], dtype=torch.float64)
    number = weights.sum()
    if (weights > 0).sum() < 2:
        return 0 * number

    def one(i: int) -> Tensor:
        x, y = torch.cat([s.student[i] for s in samples]), torch.cat([s.teacher[i] for s in samples]).detach()
        w = weights / number
        centre = torch.diag(w) - torch.outer(w, w)
        hsic = lambda a, b: torch.trace(a @ a.T @ centre @ b @ b.T @ centre)
        return number * (1 - hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())

    return mean_of(samples, one)


def test_by_hand() -> None:
    s, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert hidden_cosine(s, t).item() == pytest.approx(1 - 24 / 25)
    assert hidden_normalized(s, t).item() == pytest.approx(4.0)  # (−1, 1) and (1, −1)
    assert hidden_normalized(s, 5 + 7 * s).item() == pytest.approx(0, abs=1e-6)
    assert unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


def test_cosine_against_torch_and_patient_distillation() -> None:
    s, t = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hidden_cosine(s, t), 1 - F.cosine_similarity(s, t))
    torch.testing.assert_close((F.normalize(s) - F.normalize(t)).square().sum(-1), 2 * hidden_cosine(s, t))  # PKD, equation 7


def test_cosine_of_close_vectors_is_not_lost_in_rounding() -> None:
    t = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    s = t + 1e-3 * torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    true = 1 - F.cosine_similarity(s.double(), t.double())
    torch.testing.assert_close(hidden_cosine(s, t).double(), true, rtol=1e-3, atol=0)


def test_cka_knows_no_rotation_shift_or_scale() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(12, 5, dtype=torch.float64, generator=rng), torch.ones(12, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=rng))[0]
    assert linear_cka(x, 3 * x @ rotation + 2, w).item() == pytest.approx(1)
    assert linear_cka(x, torch.randn(12, 7, dtype=torch.float64, generator=rng), w).item() < 0.9
    assert linear_cka(x.float(), 1e4 * x.float() @ rotation.float(), w.float()).item() == pytest.approx(1, abs=1e-5)
    assert linear_cka(torch.ones(3, 2, dtype=torch.float64), x[:3], w[:3]).item() == 0  # nothing varies


def test_what_was_matched_is_said() -> None:
    assert make(HiddenMSE, {"layers": [[2, 4], [0, 0]]}).summary() == [
        "student layer 2 ↔ teacher layer 4, linear 6→10",
        "student layer 0 ↔ teacher layer 0, linear 6→10",
    ]
    assert make(HiddenCosine, {"layers": "last", "projector": "mlp"}).summary() == ["student layer 2 ↔ teacher layer 4, mlp 6→10"]
    assert make(HiddenCKA, {"layers": "last"}).summary() == ["student layer 2 ↔ teacher layer 4, no projector"]
    loss = make(HiddenMSE, {"layers": "uniform"})
    assert loss.student_taps == ("layers.0:input", "layers.0", "layers.1")
    assert loss.teacher_taps == ("layers.0:input", "layers.1", "layers.3")


def test_projectors_are_trained_and_kept_but_belong_to_the_term() -> None:
    loss = make(HiddenMSE, {"layers": "last"})
    assert list(loss.state_dict()) == ["projectors.0.weight"]
    assert all(p.requires_grad for p in loss.parameters())
    assert not list(make(HiddenCKA).parameters())


def test_a_missing_projector_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.losses\.it\.projector: the student is 6 wide and the teacher 10"):
        make(HiddenMSE, {"projector": "none"})


def test_named_modules_that_do_not_run_or_are_of_another_width() -> None:
    loss = make(HiddenNormalized, {"layers": [["layers.0.up", "layers.0.mlp"]]})
    student, teacher, batch = lay_out(loss, draw(loss))
    student.taps["layers.0.up"] = student.taps["layers.0.up"][..., :4]
    with pytest.raises(ConfigError, match=r"it\.layers: 'layers\.0\.up' of the student gives 4 values, but its weights are 9 wide"):
        loss(student, teacher, batch)
    del student.taps["layers.0.up"]
    with pytest.raises(ConfigError, match=r"it\.layers: the student does not run 'layers\.0\.up'"):
        loss(student, teacher, batch)


def test_layers_are_averaged() -> None:
    both, first, second = (make(HiddenCKA, {"layers": pairs}) for pairs in ([[0, 0], [2, 4]], [[0, 0]], [[2, 4]]))
    samples = draw(both)
    parts = [[Sample([s.student[i]], [s.teacher[i]], s.labels) for s in samples] for i in (0, 1)]
    expected = (evaluate(first, parts[0]).value + evaluate(second, parts[1]).value) / 2
    torch.testing.assert_close(evaluate(both, samples).value, expected)
