"""What a student is measured by, whatever it was trained on: one pass over the valid tokens, nothing of size `[N, V]`."""

import torch
from torch import Tensor

from distill.losses.chunked import chunk_size, chunks, flatten
from distill.losses.divergence import forward_kl
from distill.losses.hard import cross_entropy
from distill.losses.support import log_probs
from distill.types import Outputs


@torch.no_grad()
def measure(student: Outputs, teacher: Outputs | None, labels_BT: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Sum the measures over the valid positions.

    Returns:
        Scalars in float64, each a sum over positions: `count`; `loss` (cross-entropy, nats) and `accuracy` (top-1) of the student; and with
        a teacher `teacher_loss`, `teacher_accuracy`, `kl` (forward KL at T = 1 whatever T was trained, nats) and `agreement` (same top-1).
    """
    features, targets, labels = flatten(student, teacher, labels_BT)
    names = ("count", "loss", "accuracy") + (("teacher_loss", "teacher_accuracy", "kl", "agreement") if teacher is not None else ())
    sums = {name: torch.zeros((), dtype=torch.float64, device=labels.device) for name in names}
    sums["count"] += len(labels)
    for rows in chunks(len(labels), chunk_size(num_classes, labels.device)):
        logp, y = log_probs(student.head(features[rows]), num_classes), labels[rows]
        top = logp.argmax(-1)
        sums["loss"] += cross_entropy(logp, y).double().sum()
        sums["accuracy"] += (top == y).sum()
        if teacher is not None and targets is not None:
            teacher_logp = log_probs(teacher.head(targets[rows]), num_classes)
            teacher_top = teacher_logp.argmax(-1)
            sums["teacher_loss"] += cross_entropy(teacher_logp, y).double().sum()
            sums["teacher_accuracy"] += (teacher_top == y).sum()
            sums["kl"] += forward_kl(logp, teacher_logp).double().sum()
            sums["agreement"] += (top == teacher_top).sum()
    return sums
