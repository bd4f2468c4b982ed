"""The dense way for terms on taps: samples of any length laid out as rows, padded on either side or packed, against slow float64 loops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.layers import Layers
from distill.losses.base import Loss, Setting
from distill.types import IGNORE_INDEX, Outputs
from tests.losses.dense import gap
from tests.losses.dense import setting as token_setting

PARTS = ("q", "k", "v")
GARBAGE = 50.0  # what stands where nothing may look


@dataclass(frozen=True)
class Sample:
    """One document: its activations at every tap, `[n, D]` or (attention maps) `[heads, n, n]`, and its labels, `[n]` or `[1]`."""

    student: list[Tensor]
    teacher: list[Tensor]
    labels: Tensor

    @property
    def length(self) -> int:
        return self.student[0].shape[-2]

    def weights(self) -> list[float]:
        """How much each position counts: 1 where its label is valid; where the sample has one label, all positions share 1."""
        if len(self.labels) == self.length:
            return [float(label != IGNORE_INDEX) for label in self.labels.tolist()]
        return [float(self.labels.item() != IGNORE_INDEX) / self.length] * self.length


Reference = Callable[..., Tensor]  # (samples, parameters, **settings) -> scalar, in float64


@dataclass(frozen=True)
class Result:
    """A value, and its gradients by the student's taps (sample by sample) and by the term's own parameters, flattened."""

    value: Tensor
    taps: Tensor
    parameters: Tensor


def student_layers() -> Layers:
    """Two layers of width 6, keys and values narrower than queries; `layers.0.mlp` and `layers.0.up` have names."""
    widths = {"layers.0.mlp": 6, "layers.0.up": 9}
    return Layers("model.student", ("layers.0", "layers.1"), 6, 2, "attn", tuple(zip(PARTS, (8, 4, 4), strict=True)), "eager", widths)


def teacher_layers() -> Layers:
    """Four layers of width 10."""
    blocks = tuple(f"layers.{i}" for i in range(4))
    widths = {f"{block}.mlp": 10 for block in blocks}
    return Layers("model.teacher", blocks, 10, 2, "attn", tuple(zip(PARTS, (12, 8, 8), strict=True)), "eager", widths)


def setting(**changes: Any) -> Setting:
    """Give what a term is prepared with: the two models above."""
    given: dict[str, Any] = {"student": student_layers(), "teacher": teacher_layers(), "num_samples": 37}
    return token_setting(5, **(given | changes))


def make(cls: type[Loss], given: dict[str, Any] | None = None, **changes: Any) -> Loss:
    """Make a term as the module does: construct, then prepare; its parameters do not depend on what was drawn before."""
    torch.manual_seed(0)
    loss = cls(**(given or {}))
    loss.prepare(setting(**changes))
    return loss


def draw(
    loss: Loss,
    lengths: tuple[int, ...] = (4, 2, 5),
    mask: str = "some",
    unit: str = "token",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: tuple[Layers, Layers] | None = None,
) -> list[Sample]:
    """Draw activations of order 1 at the taps of a term; `mask` is none, some, one (a single valid label) or all."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = layers or (student_layers(), teacher_layers())
    samples = []
    for n in lengths:
        ours = [_activation(student, tap, n, rng).to(dtype) for tap in loss.student_taps]
        theirs = [_activation(teacher, tap, n, rng).to(dtype) for tap in loss.teacher_taps]
        samples.append(Sample(ours, theirs, torch.randint(5, (n if unit == "token" else 1,), generator=rng)))
    whole = torch.cat([sample.labels for sample in samples])
    masked = {
        "none": torch.zeros(len(whole)),
        "some": torch.arange(len(whole)) % 3 == 1,
        "one": torch.arange(len(whole)) != 1,
        "all": torch.ones(len(whole)),
    }[mask].bool()
    for sample, hidden in zip(samples, masked.split([len(sample.labels) for sample in samples]), strict=True):
        sample.labels[hidden] = IGNORE_INDEX
    return samples


def _activation(layers: Layers, tap: str, n: int, rng: torch.Generator) -> Tensor:
    if tap.endswith(":1"):
        return torch.randn(layers.heads, n, n, generator=rng, dtype=torch.float64).softmax(-1)
    width = dict(layers.projections).get(tap.rsplit(".", 1)[-1], layers.widths.get(tap, layers.width))
    return torch.randn(n, width, generator=rng, dtype=torch.float64)


Laid = tuple[Outputs, Outputs, dict[str, Tensor]]


def lay_out(loss: Loss, samples: list[Sample], how: str = "right") -> Laid:
    """Make outputs and a batch of samples: a row each, padded `right` or `left` by at least two positions, or `bare` (of one length,
    without a mask); or all `packed` into one row, whose end is padded by a segment of its own."""
    longest, total = max(s.length for s in samples), sum(s.length for s in samples)
    length = {"bare": longest, "packed": total + 3}.get(how, longest + 2)
    places, at = [], 0
    for row, sample in enumerate(samples):
        start = {"left": length - sample.length, "packed": at}.get(how, 0)
        places.append((0 if how == "packed" else row, start))
        at += sample.length
    rows = 1 if how == "packed" else len(samples)

    def side(name: str, taps: tuple[str, ...]) -> Outputs:
        laid = {tap: _place([getattr(s, name)[i] for s in samples], places, rows, length) for i, tap in enumerate(taps)}
        return Outputs(torch.zeros(rows, length, 1), nn.Identity(), laid)

    return side("student", loss.student_taps), side("teacher", loss.teacher_taps), _batch(samples, places, rows, length, how)


def _batch(samples: list[Sample], places: list[tuple[int, int]], rows: int, length: int, how: str) -> dict[str, Tensor]:
    per_sample = len(samples[0].labels) == 1 and samples[0].length > 1
    mask, labels = torch.zeros(rows, length, dtype=torch.long), torch.full((rows, 1 if per_sample else length), IGNORE_INDEX)
    positions = torch.arange(length).repeat(rows, 1)
    for sample, (row, start) in zip(samples, places, strict=True):
        mask[row, start : start + sample.length] = 1
        positions[row, start:] = torch.arange(length - start)
        labels[row, slice(None) if per_sample else slice(start, start + sample.length)] = sample.labels
    if how == "packed":
        positions[0, length - 3 :] = torch.arange(3)
        return {"labels": labels, "position_ids": positions}
    return {"labels": labels} if how == "bare" else {"labels": labels, "attention_mask": mask}


def _place(parts: list[Tensor], places: list[tuple[int, int]], rows: int, length: int) -> Tensor:
    first = parts[0]
    if first.ndim == 3:
        whole = torch.full((rows, len(first), length, length), GARBAGE, dtype=first.dtype)
    else:
        whole = torch.full((rows, length, first.shape[-1]), GARBAGE, dtype=first.dtype)
    for part, (row, start) in zip(parts, places, strict=True):
        span = slice(start, start + part.shape[-2])
        if part.ndim == 3:
            whole[row, :, span, span] = part
        else:
            whole[row, span] = part
    return whole


def leaves(samples: list[Sample], dtype: torch.dtype | None = None) -> list[Sample]:
    """Copy the samples; the student's and the teacher's tensors want a gradient, so that a leak would show."""
    fresh = lambda x: x.detach().to(dtype or x.dtype).clone().requires_grad_()
    return [Sample([fresh(x) for x in s.student], [fresh(x) for x in s.teacher], s.labels) for s in samples]


def evaluate(loss: Loss, samples: list[Sample], how: str = "right", autocast: bool = False) -> Result:
    """Evaluate the code under test, and differentiate; the teacher must get no gradient, and every parameter one."""
    copies = leaves(samples)
    loss.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(*lay_out(loss, copies, how))
    value.backward()
    assert all(x.grad is None for s in copies for x in s.teacher), "the teacher has a gradient"
    assert all(p.grad is not None for p in loss.parameters()), "a parameter is left out, which DDP does not forgive"
    return _result(value, copies, list(loss.parameters()))


def dense(reference: Reference, loss: Loss, samples: list[Sample], **given: Any) -> Result:
    """Evaluate a reference in float64, and differentiate."""
    copies = leaves(samples, torch.float64)
    parameters = {name: p.detach().double().requires_grad_() for name, p in loss.named_parameters()}
    value = reference(copies, parameters, **given)
    if value.requires_grad:
        value.backward()
    return _result(value, copies, list(parameters.values()))


def _result(value: Tensor, samples: list[Sample], parameters: list[Any]) -> Result:
    def gradients(tensors: list[Tensor]) -> Tensor:
        flat = [(torch.zeros_like(x) if x.grad is None else x.grad).flatten().double() for x in tensors]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *flat])

    return Result(value.detach().double(), gradients([x for s in samples for x in s.student]), gradients(parameters))


def assert_close(ours: Result, reference: Result, tolerance: float) -> None:
    """Compare value and gradients, relative to the reference's norm."""
    for name in ("value", "taps", "parameters"):
        found = gap(getattr(ours, name), getattr(reference, name))
        assert found <= tolerance, f"{name}: relative difference {found:.2e}, allowed {tolerance:.0e}"


# ---- for references: slow, obvious, float64


def mean_of(samples: list[Sample], one: Callable[[int], Tensor]) -> Tensor:
    """The mean over pairs of taps."""
    count = len(samples[0].student)
    return sum((one(i) for i in range(count)), torch.zeros((), dtype=torch.float64)) / count


def labelled(samples: list[Sample]) -> list[Sample]:
    """The samples with at least one valid label."""
    return [s for s in samples if (s.labels != IGNORE_INDEX).any()]


def count(samples: list[Sample]) -> int:
    """How many labels are valid."""
    return sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples)
