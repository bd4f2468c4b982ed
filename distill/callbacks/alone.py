"""What quantising one layer alone costs a student, measured in the middle of a training run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch

from distill.compress import fake_quant, sensitivity
from distill.compress.schemes import Scheme
from distill.data.loader import permutation
from distill.parallel.through import through


@torch.no_grad()
def costs_alone(
    trainer: pl.Trainer, pl_module: Any, owner: int, base: Scheme, choices: Sequence[int], calibration: int
) -> dict[str, dict[int, float]]:
    """Measure by how much the student's own loss rises when one layer is quantised, all others in floats.

    Args:
        trainer: of the student; every rank comes here.
        pl_module: the DistillModule.
        owner: of the fake quantisers in question.
        base: their scheme.
        choices: numbers of bits to try.
        calibration: training rows to measure on, the first of the first epoch.

    Returns:
        Nats by layer and bits.
    """
    data, student = pl_module.data, pl_module.student
    rows = permutation(len(data.train_set), data.seed, 0)[:calibration]
    batch = trainer.strategy.batch_to_device(data.collator()([data.train_set[int(i)] for i in rows]))
    by_bits = {bits: fake_quant.weight_quantiser(replace(base, bits=bits)) for bits in choices}
    layers = fake_quant.weights_of(student, owner)

    def loss(name: str | None, bits: int) -> float:
        with fake_quant.off(student):
            if name is not None:
                layers[name][1].quantise = by_bits[bits]
            found = through(trainer, "measures", batch)
        return float(found["loss"] / found["count"])

    training, teacher = student.training, pl_module.teacher
    student.eval()
    pl_module.teacher = None  # the student's own loss is all that is asked for
    try:
        return sensitivity.increases_alone(layers, choices, loss)
    finally:
        pl_module.teacher = teacher
        student.train(training)
