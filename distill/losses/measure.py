"""What a student is measured by, whatever it was trained on: one pass over the valid tokens, nothing of size `[N, V]`."""

import torch
from torch import Tensor

from distill.losses.chunked import chunk_size, chunks, flatten
from distill.losses.divergence import forward_kl
from distill.losses.hard import cross_entropy
from distill.losses.support import Apart, Distribution, Side, log_probs
from distill.types import Outputs, Target


@torch.no_grad()
def measure(student: Outputs, teacher: Target | None, labels_BT: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Sum the measures over the valid positions.

    Args:
        student: features and head.
        teacher: a target that knows all classes, or None; against several apart, each counts by its weight at every position.
        labels_BT: `[B, T]`.
        num_classes: V.

    Returns:
        Scalars in float64, each a sum over positions: `count`; `loss` (cross-entropy, nats) and `accuracy` (top-1) of the student; and with
        a teacher `teacher_loss`, `teacher_accuracy`, `kl` (forward KL at T = 1 whatever T was trained, nats) and `agreement` (same top-1).
    """
    features, target, labels = flatten(student, teacher, labels_BT, num_classes)
    names = ("count", "loss", "accuracy") + (("teacher_loss", "teacher_accuracy", "kl", "agreement") if teacher is not None else ())
    sums = {name: torch.zeros((), dtype=torch.float64, device=labels.device) for name in names}
    sums["count"] += len(labels)
    for rows in chunks(len(labels), chunk_size(num_classes, labels.device)):
        logp, y = log_probs(student.head(features[rows]), num_classes), labels[rows]
        top = logp.argmax(-1)
        sums["loss"] += cross_entropy(logp, y).double().sum()
        sums["accuracy"] += (top == y).sum()
        for part, w in [] if target is None else _parts(target(rows)(slice(None))):
            teacher_logp = part.logp()
            teacher_top = teacher_logp.argmax(-1)
            sums["teacher_loss"] += (cross_entropy(teacher_logp, y).double() * w).sum()
            sums["teacher_accuracy"] += ((teacher_top == y).double() * w).sum()
            sums["kl"] += (forward_kl(logp, teacher_logp).double() * w).sum()
            sums["agreement"] += ((top == teacher_top).double() * w).sum()
    return sums


def _parts(side: Side) -> list[tuple[Distribution, Tensor | float]]:
    """The distributions to measure against, with the weight of each at every position."""
    sides, weights = (side.parts, side.weights.unbind(-1)) if isinstance(side, Apart) else ([side], [1.0])
    assert all(isinstance(each, Distribution) for each in sides), "a target of all classes is wanted"
    return list(zip(sides, weights, strict=True))  # type: ignore[arg-type]  # just looked at
