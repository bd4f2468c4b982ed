"""Hand-made situations: three untrained forms, and trained ones of falling size."""

from dataclasses import replace
from typing import Any

from distill.advise.parts import Budget, Figure, Form, Loss, Situation, Target

MB = 1e6


def form(name: str, kind: Any, megabytes: float, ms: float | None, **more: Any) -> Form:
    hours = more.pop("hours", None)
    loss = more.pop("loss", None)
    made = Form(
        name,
        kind,
        more.pop("export", "hf:fp32"),
        None,
        1,
        Figure(megabytes * MB, False, "made up"),
        None if ms is None else Figure(ms, False, "made up"),
        None if hours is None else Figure(hours, False, "made up"),
        10 if hours is not None else None,
        None if loss is None else Loss(loss, "nats", False, "made up"),
    )
    return replace(made, **more)


FORMS = (
    form("whole", "keep", 100, 10, loss=0.0),
    form("bf16", "ptq", 50, 30, export="hf:bf16", loss=0.0),
    form("int8", "ptq", 26, 4, export="onnx:int8", loss=0.1),
    form("int4", "ptq", 15, 9.9, export="onnx:int4", loss=0.2),
    form("QAT int4", "qat", 15, 9.9, export="onnx:int4", loss=0.05, hours=2, scheme="int4"),
    form("QAT ternary", "qat", 12, None, export="packed:int4", loss=0.4, hours=2, scheme="ternary"),
    form("pruned", "prune", 20, 3, export="onnx:int8", hours=3, sparsity=0.5),
    form("student 3", "distil", 11, 2.5, export="onnx:int8", hours=8),
    form("student 2", "distil", 9, 2, export="onnx:int8", hours=6),
    form("tiny 2", "combine", 6, 1.5, export="onnx:int4", hours=4, scheme="int4"),
    form("tiny 1", "combine", 3, 1, export="onnx:int4", hours=1, scheme="int4"),
)
UNITS: dict[str, Any] = {"size": "bytes", "latency": "ms", "quality": "nats"}


def situation(target: Target, limit: float, hours: float | None = None, forms: tuple[Form, ...] = FORMS) -> Situation:
    """A budget of so many MB, ms or nats."""
    return Situation(target, Budget(limit * (MB if target == "size" else 1), UNITS[target], f"{limit}"), hours, forms, {}, {})
