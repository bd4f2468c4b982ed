"""One mill for every token loss: whatever class is found in `distill.losses` must agree with a float64 reference of its formula.

A new loss needs nothing here. In `tests/losses/test_<its file>.py` stand
- `reference_<ClassName>(student_logits, teacher_logits, labels, **settings) -> [N]`, written from the paper in float64;
- `settings_<ClassName>`, a list of dictionaries of constructor arguments to try, where temperatures alone do not cover the class.
A loss that looks at the data gets `tests.losses.dense.setting(num_classes)`; its reference finds the same figures there.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distill.losses
from distill.losses.base import Divergence, TokenLoss
from distill.losses.block import has_closed_form
from distill.losses.chunked import chunked_objective
from distill.losses.support import Distribution
from distill.types import Outputs
from tests.losses.dense import Case, Reference, assert_close, gap, setting
from tests.losses.test_divergence import reference_ForwardKL

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
assert distill.losses.__path__, "imported so that every loss is defined"


def concrete(base: type[TokenLoss]) -> Iterator[type[TokenLoss]]:
    for cls in base.__subclasses__():
        yield from concrete(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("distill.losses."):
            yield cls


def beside(cls: type[TokenLoss], kind: str) -> Any:
    """Find `<kind>_<ClassName>` in the test of the file that holds the class, or None."""
    path = Path(__file__).parent / "losses" / f"test_{cls.__module__.rsplit('.', 1)[1]}.py"
    return getattr(import_module(f"tests.losses.{path.stem}"), f"{kind}_{cls.__name__}", None) if path.exists() else None


def reference_of(cls: type[TokenLoss]) -> Reference:
    name = f"reference_{cls.__name__}"
    if found := beside(cls, "reference"):
        return found
    takes = ", temperature=1.0, t_squared=True" if issubclass(cls, Divergence) else ""
    pytest.fail(
        f"no reference for {cls.__name__}: write `def {name}(student_logits, teacher_logits, labels{takes}) -> Tensor` in "
        f"tests/losses/test_{cls.__module__.rsplit('.', 1)[1]}.py, from the paper's formula in float64 on raw logits, giving [N] nats"
    )


def variants(cls: type[TokenLoss]) -> list[dict[str, Any]]:
    """The settings to try: those that its test names, and every temperature where there is one."""
    named: list[dict[str, Any]] = beside(cls, "settings") or [{}]
    if "temperature" not in inspect.signature(cls).parameters:
        return named
    return [given | {"temperature": t} for t in TEMPERATURES for given in named]


def plainest(cls: type[TokenLoss]) -> dict[str, Any]:
    """The first of its settings, at T = 1."""
    return {k: 1.0 if k == "temperature" else v for k, v in variants(cls)[0].items()}


def make(cls: type[TokenLoss], num_classes: int, **given: Any) -> TokenLoss:
    """Make a loss as the module does: construct, then prepare."""
    loss = cls(**(given or plainest(cls)))
    loss.prepare(setting(num_classes))
    return loss


Check = Callable[[type[TokenLoss], Reference], None]


def agrees_with_the_reference(cls: type[TokenLoss], reference: Reference) -> None:
    for i, (chosen, mask, chunk) in enumerate(product(variants(cls), ("none", "some", "one", "all"), (1, 3, 100))):
        case = Case.random(seed=i, mask=mask)
        assert_close(case.chunked(make(cls, case.num_classes, **chosen), chunk=chunk), case.dense(reference, **chosen), 1e-5)


def agrees_in_bfloat16(cls: type[TokenLoss], reference: Reference) -> None:
    for i, chosen in enumerate(variants(cls)):
        case = Case.random(seed=i, shape=(4, 16), num_classes=50, widths=(32, 48), dtype=torch.bfloat16)
        assert_close(case.chunked(make(cls, case.num_classes, **chosen), chunk=16), case.dense(reference, rounded=True, **chosen), 5e-3)


def does_not_depend_on_the_chunk(cls: type[TokenLoss], reference: Reference) -> None:
    case = Case.random(dtype=torch.float64)
    whole = case.chunked(make(cls, case.num_classes), chunk=1000)
    for chunk in (1, 2, 3, 5):
        assert_close(case.chunked(make(cls, case.num_classes), chunk=chunk), whole, 1e-12)


def closed_form_and_autograd_agree(cls: type[TokenLoss], reference: Reference) -> None:
    class LeftToAutograd(cls):  # type: ignore[misc, valid-type]
        def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
            return super().forward(student, teacher, labels_N)

    assert not has_closed_form(LeftToAutograd)
    for i, chosen in enumerate(variants(cls) if has_closed_form(cls) else []):
        case = Case.random(seed=i, dtype=torch.float64)
        ours = case.chunked(make(cls, case.num_classes, **chosen), chunk=3)
        assert_close(ours, case.chunked(make(LeftToAutograd, case.num_classes, **chosen), chunk=3), 1e-12)


def padding_of_the_vocabulary_does_not_matter(cls: type[TokenLoss], reference: Reference) -> None:
    case = Case.random()
    before = case.chunked(make(cls, case.num_classes))
    case.student_weight[case.num_classes :] *= 100
    case.teacher_weight[case.num_classes :] *= -100
    after = case.chunked(make(cls, case.num_classes))
    assert_close(after, before, 1e-6)
    assert (after.weight[case.num_classes :] == 0).all(), "rows of the padding have a gradient"
    assert (after.weight[: case.num_classes] != 0).any()


def the_teacher_gets_no_gradient(cls: type[TokenLoss], reference: Reference) -> None:
    case = Case.random()
    student, teacher = case.student(), case.teacher()
    total, sums, _ = chunked_objective(student, teacher, case.labels, {"it": make(cls, case.num_classes)}, {"it": 1.0}, case.num_classes, 3)
    total.backward()
    assert teacher.features.grad is None
    assert next(teacher.head.parameters()).grad is None
    assert not sums["it"].requires_grad


def is_zero_where_student_is_teacher(cls: type[TokenLoss], reference: Reference) -> None:
    if not issubclass(cls, Divergence):
        return
    logits = 3 * torch.randn(1, 20, 300, generator=torch.Generator().manual_seed(0))
    for chosen in variants(cls):
        value, gradient = on_logits(make(cls, 300, **chosen), logits, logits)
        assert abs(value) <= 20 * 1e-6
        assert gradient.abs().max() <= 1e-5


def t_squared_is_in_value_and_gradient(cls: type[TokenLoss], reference: Reference) -> None:
    if not issubclass(cls, Divergence):
        return
    case = Case.random(dtype=torch.float64)
    plain, squared = (
        case.chunked(make(cls, case.num_classes, **{**plainest(cls), "temperature": 4.0, "t_squared": squared}))
        for squared in (False, True)
    )
    for name in ("value", "features", "weight"):
        assert gap(getattr(squared, name), 16 * getattr(plain, name)) <= 1e-12, f"{name} is not 16 times as large at T = 4"


def is_accurate_on_half_precision_logits(cls: type[TokenLoss], reference: Reference) -> None:
    rng = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(8, 1, 32000, generator=rng)
    teacher = student + 0.04 * torch.randn(8, 1, 32000, generator=rng)
    labels = torch.zeros(1, dtype=torch.long)
    for dtype in (torch.bfloat16, torch.float16):
        for s, t in zip(student.to(dtype), teacher.to(dtype), strict=True):
            value, _ = on_logits(make(cls, 32000), s[None], t[None])
            true = reference(s.double(), t.double(), labels, **plainest(cls)).item()
            assert value >= 0
            assert value == pytest.approx(true, rel=1e-2)


def stays_finite_on_extreme_logits(cls: type[TokenLoss], reference: Reference) -> None:
    high, low, mixed = torch.tensor([1e4, -1e4, 0.0]), torch.tensor([-1e4, 1e4, 0.0]), torch.tensor([1e4, 1e4, -1e4])
    rows = list(product((high, low, mixed, torch.zeros(3)), repeat=2))
    student, teacher = torch.stack([s for s, _ in rows])[None], torch.stack([t for _, t in rows])[None]
    for chosen in variants(cls):
        value, gradient = on_logits(make(cls, 3, **chosen), student, teacher)
        assert torch.tensor(value).isfinite()
        assert gradient.isfinite().all()


def stays_finite_where_a_class_is_ruled_out(cls: type[TokenLoss], reference: Reference) -> None:
    out = float("-inf")
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.5], [out, 2.0, 3.0, 0.5], [1.0, out, out, 0.5], [1.0, out, out, out]])
    student, teacher = (torch.stack([row for pair in product(logits, repeat=2) for row in (pair[i],)])[None] for i in (0, 1))
    for chosen in variants(cls):
        value, gradient = on_logits(make(cls, 4, **chosen), student, teacher)
        assert torch.tensor(value).isfinite()
        assert gradient.isfinite().all()


def its_weight_scales_the_gradient(cls: type[TokenLoss], reference: Reference) -> None:
    case = Case.random(dtype=torch.float64)
    one, some = case.chunked({"it": make(cls, case.num_classes)}), case.chunked({"it": make(cls, case.num_classes)}, {"it": 0.37})
    for name in ("value", "features", "weight"):
        assert gap(getattr(some, name), 0.37 * getattr(one, name)) <= 1e-12


def does_without_a_teacher_where_it_says_so(cls: type[TokenLoss], reference: Reference) -> None:
    if cls.needs_teacher:
        return
    case = Case.random()
    total, _, _ = chunked_objective(case.student(), None, case.labels, {"it": make(cls, case.num_classes)}, {"it": 1.0}, case.num_classes)
    assert gap(total.detach(), case.dense(reference, **plainest(cls)).value) <= 1e-5


MILL: tuple[Check, ...] = (
    agrees_with_the_reference,
    agrees_in_bfloat16,
    does_not_depend_on_the_chunk,
    closed_form_and_autograd_agree,
    padding_of_the_vocabulary_does_not_matter,
    the_teacher_gets_no_gradient,
    is_zero_where_student_is_teacher,
    t_squared_is_in_value_and_gradient,
    is_accurate_on_half_precision_logits,
    stays_finite_on_extreme_logits,
    stays_finite_where_a_class_is_ruled_out,
    its_weight_scales_the_gradient,
    does_without_a_teacher_where_it_says_so,
)


def on_logits(loss: TokenLoss, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """Evaluate on logits `[1, T, V]` that come as features of an identity head; label 0 everywhere."""
    leaf = student.clone().requires_grad_()
    labels = torch.zeros(student.shape[:2], dtype=torch.long)
    head = nn.Identity()
    total, _, _ = chunked_objective(Outputs(leaf, head), Outputs(teacher, head), labels, {"it": loss}, {"it": 1.0}, student.shape[-1], 4)
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


LOSSES = sorted(set(concrete(TokenLoss)), key=lambda cls: cls.__name__)  # type: ignore[type-abstract]


def test_losses_are_found() -> None:
    assert {"ForwardKL", "CrossEntropy"} <= {cls.__name__ for cls in LOSSES}


@pytest.mark.parametrize("check", MILL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_loss(cls: type[TokenLoss], check: Check) -> None:
    check(cls, reference_of(cls))


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_loss_on_any_shape(cls: type[TokenLoss], data: st.DataObject) -> None:
    size = st.integers(1, 6)
    chosen = data.draw(st.sampled_from(variants(cls)))
    case = Case.random(
        seed=data.draw(st.integers(0, 10_000)),
        shape=(data.draw(size), data.draw(size)),
        num_classes=data.draw(st.integers(2, 40)),
        padding=(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))),
        widths=(data.draw(size), data.draw(size)),
        mask=data.draw(st.sampled_from(["none", "some", "one", "all"])),
        dtype=torch.float64,
    )
    assert_close(
        case.chunked(make(cls, case.num_classes, **chosen), chunk=data.draw(st.integers(1, 40))),
        case.dense(reference_of(cls), **chosen),
        1e-8,
    )


# ---- the mill itself: each of these is wrong in one way, and the named check must say so


class _Wrong(Divergence):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return (teacher_logp_NV.exp() * (teacher_logp_NV - student_logp_NV)).sum(-1)


class SquareMissingInTheGradient(_Wrong):
    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        value = super().forward(student, teacher, labels_N) / self.T**2
        return value + (value * (self.T**2 - 1)).detach() if self.t_squared else value


class TheOtherDirection(_Wrong):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return super().divergence(teacher_logp_NV, student_logp_NV, labels_N)


class MeanOfTheChunk(_Wrong):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        value = super().divergence(student_logp_NV, teacher_logp_NV, labels_N)
        return value / len(value)


class InHalfPrecision(_Wrong):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return super().divergence(student_logp_NV.bfloat16(), teacher_logp_NV.bfloat16(), labels_N).float()


class ThroughProbabilities(_Wrong):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return (teacher_logp_NV.exp() * (teacher_logp_NV.exp().log() - student_logp_NV.exp().log())).sum(-1)


class OffByAConstant(_Wrong):
    def divergence(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, labels_N: Tensor) -> Tensor:
        return super().divergence(student_logp_NV, teacher_logp_NV, labels_N) + 1e-4


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (SquareMissingInTheGradient, t_squared_is_in_value_and_gradient),
        (SquareMissingInTheGradient, agrees_with_the_reference),
        (TheOtherDirection, agrees_with_the_reference),
        (TheOtherDirection, agrees_in_bfloat16),
        (MeanOfTheChunk, does_not_depend_on_the_chunk),
        (InHalfPrecision, is_accurate_on_half_precision_logits),
        (ThroughProbabilities, stays_finite_on_extreme_logits),
        (OffByAConstant, is_zero_where_student_is_teacher),
    ],
)
def test_the_mill_catches(cls: type[TokenLoss], check: Check) -> None:
    with pytest.raises(AssertionError):
        check(cls, reference_ForwardKL)


@pytest.mark.parametrize("check", MILL, ids=lambda check: check.__name__)
def test_the_mill_passes_what_the_wrong_ones_are_made_from(check: Check) -> None:
    check(_Wrong, reference_ForwardKL)


def test_a_loss_without_a_reference_is_told_what_to_write() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"write `def reference_OffByAConstant\(student_logits, teacher_logits, labels, temp"):
        reference_of(OffByAConstant)
