import random
from pathlib import Path

import numpy as np
import torch

from distill.callbacks import rng


def draw() -> list[float]:
    return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(np.random.rand()), torch.randn(()).item()]


def test_all_three_generators_go_on_from_a_file_that_the_safe_loader_takes(tmp_path: Path) -> None:
    draw()  # each has half of a pair of normal numbers left over, which is part of the state
    torch.save(rng.gather(rng.state()), tmp_path / "rng.pt")
    expected = draw()
    (states,) = torch.load(tmp_path / "rng.pt", weights_only=True)
    assert draw() != expected
    rng.restore(states)
    assert draw() == expected
