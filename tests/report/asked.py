"""Evidence out of logits made by hand, for tests of the chapters that compare models."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.report.evidence import Evidence, Subject
from distill.report.observe import observe
from distill.tasks import CausalLM, SequenceClassification
from distill.types import Outputs

CPU = torch.device("cpu")
V = 6  # classes of `language`


def evidence(
    logits: Mapping[str, Tensor], labels: Tensor, counts: list[int] | None = None, folder: Path = Path("none"), **changes: Any
) -> Evidence:
    """What models said of one batch of rows.

    Args:
        logits: `[R, T, V]` by model; the last name is the final student's. T of 1 is a classifier's.
        labels: `[R, T]`.
        counts: how often each class is trained on; 1,000 times if None.
        folder: of the run.
        changes: of the evidence.
    """
    num_classes = next(iter(logits.values())).shape[-1]
    subjects = {name: Subject(lambda batch, z=z: Outputs(z, nn.Identity())) for name, z in logits.items()}
    batch = {"labels": labels}
    data = SimpleNamespace(class_counts=lambda: torch.tensor(counts or [1000] * num_classes), class_name=lambda i: f"class {i}")
    given: dict[str, Any] = {
        "folder": folder,
        "student": list(logits)[-1],
        "subjects": subjects,
        "task": CausalLM() if labels.shape[1] > 1 else SequenceClassification(),
        "data": cast(Any, data),
        "device": CPU,
        "batches": [batch],
        "observed": observe(subjects, [batch], num_classes, CPU, len(labels)),
        "run": {},
        "log": [],
        "config": {},
    }
    return Evidence(**given | changes)


def saying(top: Tensor, num_classes: int, sure: float = 3.0) -> Tensor:
    """Logits `[..., V]` whose likeliest class is `top`."""
    return sure * nn.functional.one_hot(top, num_classes).float()


def logits(seed: int, rows: int = 30, length: int = 8, v: int = V) -> Tensor:
    """Logits that are of order 1."""
    return 1.5 * torch.randn(rows, length, v, generator=torch.Generator().manual_seed(seed))


def language(folder: Path = Path("none"), **changes: Any) -> Evidence:
    """A teacher, a student like it of a tenth of the size, and that student before."""
    said = {"teacher": logits(0), "student before": logits(1), "student distilled": logits(0) + 0.3 * logits(2)}
    parameters = {"teacher": {"parameters": 1000}, "student before": {"parameters": 100}, "student distilled": {"parameters": 100}}
    labels = torch.randint(V, (30, 8), generator=torch.Generator().manual_seed(3))
    return evidence(said, labels, folder=folder, **{"run": {"models": parameters}} | changes)
