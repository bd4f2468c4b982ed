"""One mill for every term on taps: whatever concrete `Loss` is found in `distill.losses` must agree with a float64 reference.

A new term needs nothing here. In `tests/losses/test_<its file>.py` stand
- `reference_<ClassName>(samples, parameters, **settings) -> scalar`, slow loops in float64 over `taps.Sample`, from the paper's formula;
- `settings_<ClassName>`, a list of dictionaries of constructor arguments to try.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distill.losses
from distill.losses.base import Loss
from distill.losses.features import HiddenMSE
from distill.types import Batch, Outputs
from tests.losses.dense import gap
from tests.losses.taps import (
    Reference,
    Sample,
    assert_close,
    dense,
    draw,
    evaluate,
    lay_out,
    leaves,
    make,
    setting,
    student_layers,
)
from tests.losses.test_features import reference_HiddenMSE

MASKS = ("none", "some", "one", "all")
assert distill.losses.__path__, "imported so that every loss is defined"


def concrete(base: type[Loss]) -> Iterator[type[Loss]]:
    for cls in base.__subclasses__():
        yield from concrete(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("distill.losses.") and not cls.on_features:
            yield cls  # one on features reads no taps, and has tests of its own


def beside(cls: type[Loss], kind: str) -> Any:
    """Find `<kind>_<ClassName>` in the test of the file that holds the class."""
    place = f"tests.losses.test_{cls.__module__.rsplit('.', 1)[1]}"
    found = getattr(import_module(place), f"{kind}_{cls.__name__}", None)
    return pytest.fail(f"no {kind}_{cls.__name__} in {place}; see the top of this file") if found is None else found


Check = Callable[[type[Loss], Reference, dict[str, Any]], None]


def agrees_with_the_reference(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    for seed, (mask, unit) in enumerate([*product(MASKS, ["token"]), ("some", "sample"), ("one", "sample")]):
        loss = make(cls, given)
        samples = draw(loss, mask=mask, unit=unit, seed=seed)
        expected = dense(reference, loss, samples, **given)
        for how in ("right", "left"):
            assert_close(evaluate(loss, samples, how), expected, 1e-5)


def agrees_in_bfloat16(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    samples = draw(loss, dtype=torch.bfloat16)
    assert_close(evaluate(loss, samples), dense(reference, loss, samples, **given), 1e-2)


def does_not_depend_on_the_layout(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    for lengths, layouts in (((4, 2, 5, 1), ("left", "packed")), ((3, 3, 3, 3), ("left", "packed", "bare"))):
        samples = draw(loss, lengths, dtype=torch.float64)
        for how in layouts:
            assert_close(evaluate(loss, samples, how), evaluate(loss, samples, "right"), 1e-10)


def is_additive_where_it_says_so(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    samples = draw(loss, (4, 2, 5, 3, 4, 2), dtype=torch.float64, mask="none")
    whole, first, second = (evaluate(loss, part) for part in (samples, samples[:3], samples[3:]))
    difference = gap(first.value + second.value, whole.value)
    assert difference <= 1e-12 if cls.additive else difference > 1e-3
    if cls.additive:
        assert gap(torch.cat([first.taps, second.taps]), whole.taps) <= 1e-12
        assert gap(first.parameters + second.parameters, whole.parameters) <= 1e-6  # these are in float32


def is_nothing_where_nothing_is_valid(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    for unit, how in (("token", "right"), ("sample", "left"), ("token", "packed")):
        result = evaluate(loss, draw(loss, mask="all", unit=unit), how)
        assert result.value == 0
        assert (result.taps == 0).all()
        assert (result.parameters == 0).all()


def is_nothing_where_there_is_nothing_to_compare(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    if cls.additive:
        return
    loss = make(cls, given)
    result = evaluate(loss, draw(loss, (1,), mask="none"))
    assert result.value == 0
    assert (result.taps == 0).all()


def is_zero_where_student_is_teacher(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    changes = {"layers": "last"} if "layers" in given else {}
    same = student_layers()
    loss = make(cls, given | changes, teacher=same)
    if list(loss.parameters()):
        return  # what goes through weights is not the same any more
    samples = draw(loss, (8, 16, 30), mask="none", layers=(same, same))
    result = evaluate(loss, [Sample(s.student, s.student, s.labels) for s in samples])
    assert abs(result.value) <= 54 * 1e-6  # there are 54 positions
    assert result.taps.abs().max() <= 1e-5


def padding_does_not_count_whatever_is_there(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    samples = draw(loss)
    student, teacher, batch = lay_out(loss, samples)
    before = loss(student, teacher, batch)
    for outputs in (student, teacher):
        for tap in outputs.taps.values():
            padding = ~batch["attention_mask"].bool()
            if tap.ndim == 4:
                tap.transpose(1, 2)[padding] = torch.nan
            else:
                tap[padding] = 1e4
    assert torch.equal(loss(student, teacher, batch), before)


def computes_in_full_precision_whatever_the_trainer_does(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    samples = draw(loss)
    plain = evaluate(loss, samples)
    assert_close(evaluate(loss, samples, autocast=True), plain, 1e-7)
    assert_close(evaluate(copy.deepcopy(loss).bfloat16(), samples), plain, 5e-2)  # only the weights are rounded


def can_be_prepared_again(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    before, said, taps = dict(loss.named_parameters()), loss.summary(), (loss.student_taps, loss.teacher_taps)
    loss.prepare(setting())
    assert all(after is before[name] for name, after in loss.named_parameters())
    assert (loss.summary(), (loss.student_taps, loss.teacher_taps)) == (said, taps)
    assert len(before) == len(list(loss.parameters()))
    assert loss.summary()
    assert make(cls, given).load_state_dict(loss.state_dict()).missing_keys == []


def stays_finite(cls: type[Loss], reference: Reference, given: dict[str, Any]) -> None:
    loss = make(cls, given)
    for change in (lambda x: 0 * x, lambda x: 0 * x + 1, lambda x: 1e4 * x, lambda x: 1e-6 * x):
        for both in (True, False):
            samples = [
                Sample([change(x) for x in s.student], [change(x) if both else x for x in s.teacher], s.labels)
                for s in draw(loss, (3, 4, 3), mask="none")
            ]
            result = evaluate(loss, samples)
            assert all(x.isfinite().all() for x in (result.value, result.taps, result.parameters))


MILL: tuple[Check, ...] = (
    agrees_with_the_reference,
    agrees_in_bfloat16,
    does_not_depend_on_the_layout,
    is_additive_where_it_says_so,
    is_nothing_where_nothing_is_valid,
    is_nothing_where_there_is_nothing_to_compare,
    is_zero_where_student_is_teacher,
    padding_does_not_count_whatever_is_there,
    computes_in_full_precision_whatever_the_trainer_does,
    can_be_prepared_again,
    stays_finite,
)

LOSSES = sorted(set(concrete(Loss)), key=lambda cls: cls.__name__)  # type: ignore[type-abstract]


def test_terms_are_found() -> None:
    assert {"HiddenMSE", "HiddenCKA", "AttentionMaps", "MiniLMRelations", "RKDAngle", "CRD"} <= {cls.__name__ for cls in LOSSES}


@pytest.mark.parametrize("check", MILL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_term(cls: type[Loss], check: Check) -> None:
    for chosen in beside(cls, "settings"):
        check(cls, beside(cls, "reference"), chosen)


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_term_on_any_shape(cls: type[Loss], data: st.DataObject) -> None:
    given = data.draw(st.sampled_from(beside(cls, "settings")))
    loss = make(cls, given)
    samples = draw(
        loss,
        lengths=tuple(data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=5))),
        mask=data.draw(st.sampled_from(MASKS)),
        unit=(unit := data.draw(st.sampled_from(["token", "sample"]))),
        seed=data.draw(st.integers(0, 10_000)),
        dtype=torch.float64,
    )
    how = data.draw(st.sampled_from(["right", "left"] + (["packed"] if unit == "token" else [])))
    assert_close(evaluate(loss, samples, how), dense(beside(cls, "reference"), loss, samples, **given), 1e-5)


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_one_step_down_the_gradient_lowers_the_term(cls: type[Loss]) -> None:
    loss = make(cls, beside(cls, "settings")[0])
    samples = leaves(draw(loss, mask="none", dtype=torch.float64))
    value = loss(*lay_out(loss, samples))
    value.backward()
    with torch.no_grad():
        for x in (x for s in samples for x in s.student):
            assert x.grad is not None
            x -= 1e-4 * x.grad / max(1.0, float(x.grad.norm()))
    assert loss(*lay_out(loss, samples)) < value


# ---- the mill itself: each of these is wrong in one way, and the named check must say so


class MeanInsteadOfSum(HiddenMSE):
    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        return super().compare(student_ND, teacher_ND, weights) / max(1, len(weights))


class PaddingCounts(HiddenMSE):
    def rows(self, tap_BTD: Tensor, batch: Batch, index_N: Tensor) -> Tensor:
        return tap_BTD[(batch["labels"] != -100).any(1)].flatten(0, 1)

    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        return (student_ND - teacher_ND).square().mean(-1).sum()


class TeacherLearns(HiddenMSE):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return super().forward(student, teacher, batch) + sum(tap.sum() for tap in teacher.taps.values())


class ForgetsItsProjectors(HiddenMSE):
    def prepare(self, setting: Any) -> None:
        self.matches = []
        self.projectors = torch.nn.ModuleList()
        super().prepare(setting)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (MeanInsteadOfSum, agrees_with_the_reference),
        (MeanInsteadOfSum, is_additive_where_it_says_so),
        (PaddingCounts, does_not_depend_on_the_layout),
        (PaddingCounts, padding_does_not_count_whatever_is_there),
        (TeacherLearns, agrees_in_bfloat16),
        (ForgetsItsProjectors, can_be_prepared_again),
    ],
)
def test_the_mill_catches(cls: type[Loss], check: Check) -> None:
    with pytest.raises(AssertionError):
        check(cls, reference_HiddenMSE, {})
