"""One mill for every token loss that holds on bins: against its own float64 reference on the coarsened distributions.

A new loss whose `supports` contains "bins" needs nothing here but what `tests/test_conformance.py` asks of it.
"""

from itertools import cycle, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.losses.base import TokenLoss
from distill.losses.block import has_closed_form
from distill.losses.chunked import chunked_objective
from distill.losses.divergence import ForwardKL
from distill.losses.support import Distribution
from distill.losses.variation import TotalVariation
from distill.types import Outputs, SparseTarget
from tests.losses.dense import Case, Result, assert_close, gap, linear
from tests.losses.sparse import NEVER, assert_near, coarsened, expected, found, on_bins, teacher_logits
from tests.losses.test_divergence import reference_ForwardKL
from tests.test_conformance import LOSSES, TEMPERATURES, TheOtherDirection, make, reference_of, variants

ON_BINS = [cls for cls in LOSSES if "bins" in cls.supports]
of_each = pytest.mark.parametrize("cls", ON_BINS, ids=lambda cls: cls.__name__)


def temperature_of(chosen: dict[str, Any]) -> float:
    return float(chosen.get("temperature", 1.0))


def sparse(case: Case, k: int, chosen: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> SparseTarget:
    return coarsened(teacher_logits(case), k, temperature_of(chosen), dtype=dtype, **more)


def test_losses_on_bins_are_found() -> None:
    names = {"ForwardKL", "ReverseKL", "JensenShannon", "SkewKL", "SkewReverseKL", "TotalVariation"}
    assert names <= {cls.__name__ for cls in ON_BINS}
    assert len(ON_BINS) < len(LOSSES)


# ---- on K + 1 bins


@of_each
def test_value_and_gradient_on_bins(cls: type[TokenLoss]) -> None:
    for i, (chosen, mask) in enumerate(product(variants(cls), ("none", "some", "one", "all"))):
        case = Case.random(seed=i, mask=mask)
        target = sparse(case, (1, 4, 12)[i % 3], chosen, torch.float32, seed=i, fills=i % 2 == 1)
        ours = found(case, target, make(cls, case.num_classes, **chosen), chunk=(1, 3, 100)[i // 2 % 3])
        assert_near(ours, expected(case, target, reference_of(cls), **chosen), 1e-5)


@of_each
@pytest.mark.parametrize("t_squared", [True, False])
def test_in_float64_to_rounding(cls: type[TokenLoss], t_squared: bool) -> None:
    for temperature in TEMPERATURES:
        chosen = variants(cls)[0] | {"temperature": temperature, "t_squared": t_squared}
        case = Case.random(dtype=torch.float64, mask="none")
        target = sparse(case, 5, chosen, fills=True)
        assert_close(found(case, target, make(cls, case.num_classes, **chosen)), expected(case, target, reference_of(cls), **chosen), 1e-10)


@of_each
def test_in_bfloat16(cls: type[TokenLoss]) -> None:
    for i, chosen in enumerate(variants(cls)):
        case = Case.random(seed=i, shape=(4, 8), num_classes=50, widths=(32, 48), dtype=torch.bfloat16)
        target = coarsened(teacher_logits(case, rounded=True), 8, temperature_of(chosen), i, True, torch.float32)
        ours = found(case, target, make(cls, case.num_classes, **chosen), chunk=16)
        assert_near(ours, expected(case, target, reference_of(cls), rounded=True, **chosen), 5e-3)


@of_each
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_on_any_shape_and_any_chunk(cls: type[TokenLoss], data: st.DataObject) -> None:
    size = st.integers(1, 4)
    chosen, v = data.draw(st.sampled_from(variants(cls))), data.draw(st.integers(2, 30))
    case = Case.random(
        seed=data.draw(st.integers(0, 10_000)),
        shape=(data.draw(size), data.draw(size)),
        num_classes=v,
        padding=(data.draw(st.integers(0, 5)), 0),
        widths=(data.draw(size), data.draw(size)),
        mask=data.draw(st.sampled_from(["none", "some", "one", "all"])),
        dtype=torch.float64,
    )
    target = sparse(case, data.draw(st.integers(1, v)), chosen, seed=data.draw(st.integers(0, 100)), fills=data.draw(st.booleans()))
    ours = found(case, target, make(cls, v, **chosen), chunk=data.draw(st.integers(1, 20)))
    assert_close(ours, expected(case, target, reference_of(cls), **chosen), 1e-8)


@of_each
def test_chunks_and_blocks_do_not_matter(cls: type[TokenLoss], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.random(shape=(1, 9), mask="none", dtype=torch.float64)
    target = sparse(case, 4, variants(cls)[0], fills=True)
    loss = make(cls, case.num_classes, **variants(cls)[0])
    whole = found(case, target, loss, chunk=100)
    for rows, chunk in product((1, 2, 4), (1, 3, 9)):
        monkeypatch.setattr("distill.losses.chunked.block_size", lambda *_, rows=rows: rows)
        assert_close(found(case, target, loss, chunk=chunk), whole, 1e-12)


@of_each
def test_autograd_and_closed_form_agree(cls: type[TokenLoss]) -> None:
    class LeftToAutograd(cls):  # type: ignore[misc, valid-type]
        def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
            return super().forward(student, teacher, labels_N)

    assert not has_closed_form(LeftToAutograd)
    for i, chosen in enumerate(variants(cls)):
        case = Case.random(seed=i, dtype=torch.float64)
        target = sparse(case, 4, chosen, fills=True)
        assert_close(
            found(case, target, make(cls, case.num_classes, **chosen)),
            found(case, target, make(LeftToAutograd, case.num_classes, **chosen)),
            1e-12,
        )


@of_each
def test_padding_of_the_vocabulary_does_not_matter(cls: type[TokenLoss]) -> None:
    case = Case.random()
    target = sparse(case, 4, {}, torch.float32)
    before = found(case, target, make(cls, case.num_classes))
    case.student_weight[case.num_classes :] *= 100
    after = found(case, target, make(cls, case.num_classes))
    assert_close(after, before, 1e-6)
    assert (after.weight[case.num_classes :] == 0).all(), "rows of the padding have a gradient"


@of_each
def test_no_more_than_the_divergence_of_all_classes(cls: type[TokenLoss]) -> None:
    case = Case.random(dtype=torch.float64, num_classes=30, mask="none")
    order = teacher_logits(case).argsort(-1, descending=True)  # nested sets of classes: each refines the one before
    probs = teacher_logits(case).softmax(-1).gather(-1, order)
    values = [
        float(found(case, SparseTarget(order[..., :k], probs[..., :k], probs[..., k:].sum(-1)), make(cls, 30)).value)
        for k in (1, 2, 5, 10, 20, 29)
    ]
    whole = float(case.chunked(make(cls, 30)).value)
    assert all(coarse <= fine + 1e-12 for coarse, fine in zip(values, [*values[1:], whole], strict=True))
    assert values[0] < 0.9 * whole
    assert values[-1] == pytest.approx(whole)  # a tail of one class is that class


# ---- with K = V nothing is lost


@of_each
def test_with_all_classes_it_is_the_dense_loss(cls: type[TokenLoss]) -> None:
    for i, chosen in enumerate(variants(cls)):
        case = Case.random(seed=i, mask="some")
        target = with_fills(sparse(case, case.num_classes, chosen, torch.float32, seed=i), 3 * (i % 2))
        assert float(target.tail.abs().max()) == 0
        ours, loss = found(case, target, make(cls, case.num_classes, **chosen)), make(cls, case.num_classes, **chosen)
        assert_close(ours, case.dense(reference_of(cls), **chosen), 1e-5)
        assert_close(ours, case.chunked(loss), 1e-5)


def with_fills(target: SparseTarget, count: int) -> SparseTarget:
    """The same target with −1 in `count` more places."""
    ids, probs = (nn.functional.pad(x, (0, count), value=v) for x, v in ((target.ids, -1), (target.probs, 0.0)))
    return SparseTarget(ids, probs, target.tail, target.temperature)


@of_each
def test_fills_change_nothing(cls: type[TokenLoss]) -> None:
    case = Case.random(dtype=torch.float64)
    target = sparse(case, 4, {})
    assert_close(found(case, with_fills(target, 5), make(cls, 13)), found(case, target, make(cls, 13)), 1e-12)


@of_each
def test_where_both_sides_are_equal_there_is_no_loss(cls: type[TokenLoss]) -> None:
    logits = 3 * torch.randn(1, 20, 300, generator=torch.Generator().manual_seed(0))
    for chosen in variants(cls):
        target = coarsened(logits.double(), 30, temperature_of(chosen), fills=True, dtype=torch.float32)
        value, gradient = on_logits(make(cls, 300, **chosen), logits, target)
        assert abs(value) <= 20 * 1e-6
        if cls is not TotalVariation:  # a distance: its gradient does not vanish there but jumps
            assert gradient.abs().max() <= 1e-5


# ---- extremes


def on_logits(loss: TokenLoss, student: Tensor, target: SparseTarget, chunk: int = 4) -> tuple[float, Tensor]:
    """Evaluate on logits `[1, T, V]` that come as features of an identity head; label 0 everywhere."""
    leaf, head = student.clone().requires_grad_(), nn.Identity()
    labels = torch.zeros(student.shape[:2], dtype=torch.long)
    total, _, _ = chunked_objective(Outputs(leaf, head), target, labels, {"it": loss}, {"it": 1.0}, student.shape[-1], chunk)
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


@of_each
def test_extreme_logits_and_ruled_out_classes_stay_finite(cls: type[TokenLoss]) -> None:
    out = float("-inf")
    rows = torch.tensor(
        [
            [1e4, -1e4, 0.0, 1.0],
            [-1e4, 1e4, 1e4, 0.0],
            [0.0, 0.0, 0.0, 0.0],
            [out, 2.0, 3.0, 0.5],
            [1.0, out, out, 0.5],
            [out, out, 1.0, out],
        ]
    )
    student, teacher = (torch.stack([pair[i] for pair in product(rows, repeat=2)])[None] for i in (0, 1))
    for chosen, k in zip(variants(cls), cycle((1, 3, 4))):
        target = coarsened(teacher.double(), k, temperature_of(chosen), seed=k, fills=k == 3, dtype=torch.float32)
        value, gradient = on_logits(make(cls, 4, **chosen), student, target)
        assert torch.tensor(value).isfinite()
        assert gradient.isfinite().all()


@of_each
@pytest.mark.parametrize("tail", [0.0, 1e-30, 1e-3])
@pytest.mark.parametrize("depth", [5.0, 60.0, 300.0], ids=lambda depth: f"e^-{depth:g}")
def test_a_tail_of_hardly_any_mass_on_either_side(cls: type[TokenLoss], tail: float, depth: float) -> None:
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(1, 6, 40, generator=rng)
    student[..., 3:] -= depth  # 1 − Σ q_k would be 0, or noise, from depth 17 on
    ids = torch.tensor([2, 0, 1]).expand(1, 6, 3)
    probs = torch.rand(1, 6, 3, generator=rng, dtype=torch.float64)
    probs = probs / probs.sum(-1, keepdim=True) * (1 - tail)
    target = SparseTarget(ids, probs.float(), torch.full((1, 6), tail))
    value, gradient = on_logits(make(cls, 40), student, target)

    chosen = {k: 1.0 if k == "temperature" else v for k, v in variants(cls)[0].items()}
    compare_or_be_finite(cls, student, target, value, gradient, **chosen)


def compare_or_be_finite(
    cls: type[TokenLoss], student: Tensor, target: SparseTarget, value: float, gradient: Tensor, **chosen: object
) -> None:
    """Compare with the reference, unless the formula is infinite there."""
    flat = SparseTarget(target.ids[0], target.probs[0], target.tail[0], target.temperature)
    leaf, labels = student[0].double().clamp(min=-1e5).requires_grad_(), torch.zeros(student.shape[1], dtype=torch.long)
    true, other = (on_bins(reference_of(cls), leaf, flat, labels, never, **chosen).sum() for never in (NEVER, NEVER + 40))
    true.backward()
    if true.item() != pytest.approx(other.item(), rel=1e-9):
        assert torch.tensor(value).isfinite()
        assert gradient.isfinite().all()
        return
    assert value == pytest.approx(true.item(), rel=2e-5, abs=1e-6)
    assert leaf.grad is not None
    assert gap(gradient[0], leaf.grad) <= 2e-5
    if float(target.tail.min()) >= 1e-3 and leaf.grad[:, 3:].norm() > 1e-7:  # the little that the tail's classes get is right in itself
        assert gap(gradient[0, :, 3:], leaf.grad[:, 3:]) <= 2e-5


@of_each
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_student_that_rules_out_all_of_the_tail(cls: type[TokenLoss], temperature: float) -> None:
    student = torch.tensor([[[0.3, -0.2, -torch.inf, -torch.inf]]])
    target = SparseTarget(torch.tensor([[[1, 0]]]), torch.tensor([[[0.5, 0.3]]]), torch.tensor([[0.2]]), temperature)
    chosen = variants(cls)[0] | {"temperature": temperature}
    value, gradient = on_logits(make(cls, 4, **chosen), student, target)
    compare_or_be_finite(cls, student, target, value, gradient, **chosen)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_what_the_student_rules_out_costs_what_it_does_on_all_classes(temperature: float) -> None:
    student = torch.tensor([[[0.3, -0.2, -torch.inf, -torch.inf]]])
    p = torch.tensor([[[0.3, 0.5, 0.1, 0.1]]])
    target = SparseTarget(torch.tensor([[[1, 0]]]), p[..., [1, 0]], p[..., 2:].sum(-1), temperature)
    whole = SparseTarget(torch.arange(4)[None, None], p, torch.zeros(1, 1), temperature)
    (value, gradient), (of_all, gradient_of_all) = (
        on_logits(make(ForwardKL, 4, temperature=temperature), student, t) for t in (target, whole)
    )
    # one bin of two classes of the same probability on both sides; float32 holds 1e5 to 0.008
    assert value == pytest.approx(of_all, rel=1e-4)
    q = torch.cat([(student[0, 0, :2] / temperature).softmax(-1), torch.zeros(2)])
    for each in (gradient, gradient_of_all):
        torch.testing.assert_close(each[0, 0], temperature * (q - p[0, 0]), rtol=1e-2, atol=1e-5)


# ---- what the mill is worth: it must catch these


class ForgetsTheTail(TheOtherDirection):
    """Wrong on bins alone: what a formula over the known classes gives."""

    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        s, t = student_logp_NV[:, :-1], teacher_logp_NV[:, :-1]
        return (t.exp() * (t - s)).sum(-1)


@pytest.mark.parametrize("cls", [TheOtherDirection, ForgetsTheTail])
def test_the_mill_catches(cls: type[TokenLoss]) -> None:
    case = Case.random()
    target = sparse(case, 4, {}, torch.float32)
    with pytest.raises(AssertionError):
        assert_close(found(case, target, cls()), expected(case, target, reference_ForwardKL), 1e-3)


def test_the_coarsened_target_by_hand() -> None:
    logits = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64).log()
    whole = coarsened(logits, 4)
    assert whole.probs.flatten().tolist() == pytest.approx([(i + 1) / 10 for i in whole.ids.flatten().tolist()])
    some = coarsened(logits, 3, seed=1, fills=True)
    kept = [i for i in some.ids.flatten().tolist() if i >= 0]
    assert some.tail.item() == pytest.approx(1 - sum((i + 1) / 10 for i in kept))
    value = on_bins(
        reference_ForwardKL, logits[0] * 0, SparseTarget(torch.tensor([[3]]), torch.tensor([[0.4]]), torch.tensor([0.6])), torch.zeros(1)
    )
    # teacher (0.4, 0.6), student (1/4, 3/4)
    assert value.item() == pytest.approx(0.4 * torch.tensor(1.6).log().item() + 0.6 * torch.tensor(0.8).log().item(), rel=1e-6)


# ---- several weights, and a head of one's own


def test_a_weight_scales_value_and_gradient() -> None:
    case = Case.random(dtype=torch.float64)
    target = sparse(case, 4, {})
    for cls in ON_BINS:
        one, some = found(case, target, make(cls, 13)), found(case, target, {"it": make(cls, 13)}, {"it": 0.37})
        scaled = Result(0.37 * one.value, 0.37 * one.features, 0.37 * one.weight)
        assert_close(some, scaled, 1e-12)


def test_a_frozen_head() -> None:
    case = Case.random(dtype=torch.float64)
    target = sparse(case, 4, {})
    head = linear(case.student_weight).requires_grad_(False)
    features = case.student_features.clone().requires_grad_()
    total, _, _ = chunked_objective(Outputs(features, head), target, case.labels, {"it": make(ON_BINS[0], 13)}, {"it": 1.0}, 13, 3)
    total.backward()
    assert features.grad is not None
    assert gap(features.grad, found(case, target, make(ON_BINS[0], 13)).features) <= 1e-12
