"""Terms across tokenizers against float64 loops written from the formulas; a batch's alignment is drawn at random."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.losses.cross_tokenizer import ULD, AcrossTokenizers, SpanLikelihood, pieces, span_divergence, token_nll, uld
from distill.spans import Alignment
from distill.types import ConfigError, Outputs
from tests.losses.dense import setting

V, W, PAD = 11, 7, 3  # tokens of the student, of the teacher, and rows of each head beyond them


def reference_uld(q: Tensor, p: Tensor) -> float:
    ours, theirs = sorted(q.tolist(), reverse=True), sorted(p.tolist(), reverse=True)
    n = max(len(ours), len(theirs))
    filled = [values + [0.0] * (n - len(values)) for values in (ours, theirs)]
    return math.fsum(abs(a - b) for a, b in zip(*filled, strict=True))


def reference_span(b: float, a: float, tau: float) -> float:
    """b and a are −log P of student and teacher; the sum of two terms of a KL divergence, as it stands in the paper."""
    q, p = math.exp(-b / tau), math.exp(-a / tau)
    return tau * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


# ---- the formulas


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_uld_is_the_sum_over_sorted_probabilities(v: int, w: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(4, n, generator=rng, dtype=torch.float64).softmax(-1) for n in (v, w))
    assert torch.allclose(uld(q, p), torch.tensor([reference_uld(a, b) for a, b in zip(q, p, strict=True)], dtype=torch.float64))
    assert uld(q, q[:, torch.randperm(v, generator=rng)]).abs().max() < 1e-12, "which class has it does not matter"


def test_uld_by_hand() -> None:
    assert uld(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0.4, 0.6]])).item() == pytest.approx(0.1 + 0.2 + 0.1)
    assert uld(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == 0
    assert uld(torch.full((1, 1000), 1e-3), torch.tensor([[1.0]])).item() == pytest.approx(2 * 0.999, rel=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 10.0, 100.0])
def test_span_divergence_is_a_kl_of_one_event(tau: float) -> None:
    b, a = (torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 8 + 1e-3 for i in (0, 1))
    expected = [reference_span(x, y, tau) for x, y in zip(b.tolist(), a.tolist(), strict=True)]
    assert torch.allclose(span_divergence(b, a, tau), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)
    assert torch.allclose(span_divergence(b.float(), a.float(), tau).double(), torch.tensor(expected, dtype=torch.float64), atol=3e-5)
    assert (span_divergence(b, b, tau) == 0).all()
    assert torch.autograd.gradcheck(lambda x: span_divergence(x, a, tau), b.requires_grad_())


def test_the_gradient_is_that_of_the_authors_program() -> None:
    b, a = (torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 8 + 0.1 for i in (0, 1))
    b.requires_grad_()
    log_true, log_pred = -a / 100 - 1e-6, -b / 100 - 1e-6
    printed = -(log_true.exp() * log_pred + -torch.expm1(log_true) * torch.log1p(-log_pred.exp()))
    theirs = torch.autograd.grad(printed.sum(), b)[0] * 100
    assert torch.allclose(torch.autograd.grad(span_divergence(b, a).sum(), b)[0], theirs, rtol=2e-2, atol=1e-4)


def test_towards_a_large_temperature() -> None:
    b, a = torch.tensor([0.3, 2.0, 40.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 30.0], dtype=torch.float64)
    assert torch.allclose(span_divergence(b, a, 1e6), b - a + a * (a / b).log(), rtol=1e-4)


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_likelihoods_of_nearly_0_and_1_stay_finite(tau: float) -> None:
    ends = torch.tensor([0.0, 1e-12, 1e-3, 5.0, 300.0, 1e5])
    b, a = (x.flatten().clone() for x in torch.meshgrid(ends, ends, indexing="ij"))
    logits = torch.stack([b, torch.zeros_like(b)], -1).requires_grad_()  # with −log P of the second up to b
    value = span_divergence(token_nll(logits, torch.ones(len(b), dtype=torch.int64)), a, tau)
    value.sum().backward()
    assert value.isfinite().all()
    assert (value > -1e-4).all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_token_nll_is_exact_where_the_label_is_nearly_certain() -> None:
    logits = torch.tensor([[30.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-40.0, 3.0, 0.0]])
    wide = logits.double()
    rest = wide[:, 1:].logsumexp(-1)
    expected = torch.log1p((rest - wide[:, 0]).exp())
    found = token_nll(logits, torch.zeros(3, dtype=torch.int64))
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0)
    assert 0 < found[0] < 1e-12, "where 1 − exp(log_softmax) is 0 in float32"
    assert torch.allclose(token_nll(wide, torch.tensor([1, 2, 0])), -wide.log_softmax(-1)[range(3), [1, 2, 0]])


# ---- the terms


class Case:
    """Two heads, features, and an alignment drawn at random, with positions on both sides that take no part."""

    def __init__(self, seed: int = 0, spans: int = 9, dtype: torch.dtype = torch.float64, rows: int = 3) -> None:
        rng = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)
        ours, theirs = (torch.randint(1, 4, (spans,), generator=rng) for _ in range(2))
        steps, self.dtype = 2 + int(max(ours.sum(), theirs.sum(), 1)), dtype
        self.student, self.teacher = draw(rows, steps, 5).requires_grad_(), draw(rows, steps, 4)
        self.heads = [nn.Linear(5, V + PAD, dtype=dtype), nn.Linear(4, W, dtype=dtype)]
        for head in self.heads:
            for p in head.parameters():
                p.data = draw(*p.shape)
        at = [torch.randperm(rows * steps, generator=rng)[: int(n.sum())].sort().values for n in (ours, theirs)]
        self.labels = torch.randint(0, V, (rows, steps), generator=rng)
        self.alignment = Alignment(
            at[0], torch.arange(spans).repeat_interleave(ours), at[1], torch.arange(spans).repeat_interleave(theirs),
            torch.randint(0, W, (len(at[1]),), generator=rng),
        )  # fmt: skip

    def __call__(self, loss: AcrossTokenizers, alignment: Alignment | None = None) -> Tensor:
        loss.prepare(setting(V))
        taps = (alignment or self.alignment).taps()
        return loss(Outputs(self.student, self.heads[0]), Outputs(self.teacher, self.heads[1], taps), {"labels": self.labels})

    def dense(self, loss: AcrossTokenizers) -> Tensor:
        """The definition, span by span, by autograd in float64."""
        x, y = self.student.double().flatten(0, 1), self.teacher.double().flatten(0, 1)
        z, u = (
            f @ h.weight.double().T + h.bias.double() for f, h in zip((x, y), self.heads, strict=True)
        )  # the real ones are the first columns
        z, a = z[:, :V], self.alignment
        total = torch.zeros((), dtype=torch.float64)
        for k in range(int(a.student_span.max()) + 1 if len(a.student_span) else 0):
            ours, theirs = a.student_at[a.student_span == k], a.teacher_at[a.teacher_span == k]
            if isinstance(loss, ULD):
                q, p = (logits[rows[0]].div(loss.temperature).softmax(-1) for logits, rows in ((z, ours), (u, theirs)))
                q, p = q.sort(descending=True).values, p.sort(descending=True).values
                total = total + (p - q[:W]).abs().sum() + q[W:].sum()
            else:
                b = -z.log_softmax(-1)[ours, self.labels.flatten()[ours]].sum()
                nll = -u.log_softmax(-1)[theirs, a.teacher_labels[a.teacher_span == k]].sum()
                q, p = (-b / loss.temperature).exp(), (-nll / loss.temperature).exp()
                total = total + loss.temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        return total

    def gradients(self, value: Tensor) -> list[Tensor]:
        return [g.double() for g in torch.autograd.grad(value, [self.student, *self.heads[0].parameters()])]


TERMS: list[tuple[type[AcrossTokenizers], dict[str, Any]]] = [
    (ULD, {}),
    (ULD, {"temperature": 2.0}),
    (SpanLikelihood, {}),
    (SpanLikelihood, {"temperature": 1.0}),
]
terms = pytest.mark.parametrize(("cls", "given"), TERMS, ids=lambda x: getattr(x, "__name__", str(x)))


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / (1e-12 + y.norm())) for x, y in zip(a, b, strict=True))


@terms
@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
def test_value_and_gradient_are_those_of_the_definition_at_any_chunk(cls: Any, given: dict[str, Any], chunk: int | None) -> None:
    for seed in range(3):
        case = Case(seed)
        value, expected = case(cls(chunk=chunk, **given)), case.dense(cls(**given))
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        found = case.gradients(value)
        assert gap(found, case.gradients(expected)) < 1e-9
        assert not found[1][V:].any(), "no gradient for the vocabulary's padding"


@terms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_in_less_precision(cls: Any, given: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = Case(1, spans=30, dtype=dtype)
    value, expected = case(cls(chunk=7, **given)), case.dense(cls(**given))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    assert gap(case.gradients(value), case.gradients(expected)) < tolerance


@terms
def test_under_autocast(cls: Any, given: dict[str, Any]) -> None:
    case = Case(2, spans=30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = case(cls(chunk=7, **given))
    expected = case.dense(cls(**given))
    assert value.item() == pytest.approx(expected.item(), rel=5e-2)
    if cls is SpanLikelihood:  # of a sum of absolute values rounding turns signs
        assert gap(case.gradients(value), case.gradients(expected)) < 5e-2


@terms
def test_additive_over_spans(cls: Any, given: dict[str, Any]) -> None:
    case, loss = Case(3), cls(**given)
    a, parts = case.alignment, []
    for low, high in ((0, 4), (4, 9)):
        ours, theirs = ((low <= span) & (span < high) for span in (a.student_span, a.teacher_span))
        part = (
            a.student_at[ours],
            a.student_span[ours] - low,
            a.teacher_at[theirs],
            a.teacher_span[theirs] - low,
            a.teacher_labels[theirs],
        )
        parts.append(case(loss, Alignment(*part)))
    assert (parts[0] + parts[1]).item() == pytest.approx(case(loss).item(), rel=1e-12)
    assert gap(case.gradients(parts[0] + parts[1]), case.gradients(case(loss))) < 1e-12


@terms
def test_nothing_in_common_is_zero_with_a_gradient_of_zero(cls: Any, given: dict[str, Any]) -> None:
    case = Case(4, spans=0)
    value = case(cls(**given))
    assert value == 0
    assert all(g is not None and not g.any() for g in case.gradients(value)), "every rank must have a gradient of every parameter"


@terms
def test_without_gradient(cls: Any, given: dict[str, Any]) -> None:
    case = Case(5)
    with torch.no_grad():
        value = case(cls(**given))
    assert not value.requires_grad
    assert value.item() == pytest.approx(case.dense(cls(**given)).item())


@terms
def test_zero_where_the_student_is_the_teacher(cls: Any, given: dict[str, Any]) -> None:
    case = Case(6)
    case.heads[1], case.teacher = case.heads[0], case.student.detach()
    a = case.alignment
    same = Alignment(a.student_at, a.student_span, a.student_at, a.student_span, case.labels.flatten()[a.student_at])
    loss = cls(**given)
    loss.prepare(setting(V))
    own = nn.Linear(5, V, dtype=torch.float64)
    own.weight.data, own.bias.data = case.heads[0].weight[:V], case.heads[0].bias[:V]
    value = loss(Outputs(case.student, case.heads[0]), Outputs(case.teacher, own, same.taps()), {"labels": case.labels})
    assert abs(value.item()) < 1e-12
    if cls is SpanLikelihood:
        assert max(float(g.abs().max()) for g in case.gradients(value)) < 1e-12


def test_with_spans_of_one_token_it_is_the_binary_kl_of_the_label() -> None:
    case = Case(7)
    n = len(case.alignment.student_at)
    at, labels = case.alignment.student_at, case.labels.flatten()[case.alignment.student_at] % W
    case.labels = case.labels % W
    value = case(SpanLikelihood(1.0), Alignment(at, torch.arange(n), at, torch.arange(n), labels))
    z, u = (head(f).flatten(0, 1)[at] for head, f in zip(case.heads, (case.student, case.teacher), strict=True))
    q, p = (logits.softmax(-1)[range(n), labels] for logits in (z[:, :V], u))
    expected = nn.functional.kl_div(
        torch.stack([q.log(), (1 - q).log()], -1), torch.stack([p, 1 - p], -1), reduction="sum"
    )  # torch's own, on the two-class distributions
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert gap(case.gradients(value), case.gradients(expected)) < 1e-9


def test_pieces_never_cut_a_span_and_cover_all_rows() -> None:
    a = Case(8, spans=40).alignment
    for size in (1, 3, 10, 1000):
        found = pieces(a, size)
        for side, spans in (("student", a.student_span), ("teacher", a.teacher_span)):
            rows = [spans[getattr(piece, side)] for piece in found]
            assert torch.equal(torch.cat(rows), spans)
            for piece, part in zip(found, rows, strict=True):
                assert set(part.tolist()) == set(range(piece.spans.start, piece.spans.stop))
        assert len(found) == 1 if size == 1000 else len(found) > 1
        assert max(len(rows) for rows in rows) <= 2 * size + 3


@pytest.mark.parametrize(
    ("cls", "given"), [(ULD, {"temperature": 0.0}), (SpanLikelihood, {"temperature": float("nan")}), (ULD, {"chunk": 0})]
)
def test_numbers_out_of_range(cls: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"temperature must be > 0|chunk must be at least 1"):
        cls(**given)


def test_what_they_say() -> None:
    assert "T = 1" in ULD().summary()[0]
    assert "τ = 100" in SpanLikelihood().summary()[0]
    assert ULD.supports == SpanLikelihood.supports == frozenset({"text"})
