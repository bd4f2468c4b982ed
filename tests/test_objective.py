import pytest
import torch
from torch import nn

from distill.balance.base import Measured
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy, ZLoss
from distill.objective import check, check_checkpoint, exact_figures, figures, without_teacher
from distill.types import ConfigError


def test_without_a_teacher_the_ratios_stay() -> None:
    terms = {"ce": CrossEntropy(), "kd": ForwardKL(), "z": ZLoss()}
    kept, weights = without_teacher(terms, {"ce": 0.2, "kd": 0.8, "z": 1e-4})
    assert list(kept) == ["ce", "z"]
    assert weights == {"ce": 1.0, "z": pytest.approx(5e-4)}


def test_cross_entropy_joins_where_nothing_teaches() -> None:
    kept, weights = without_teacher({"kd": ForwardKL(), "z": ZLoss()}, {"kd": 0.5, "z": 1e-4})
    assert isinstance(kept["ce"], CrossEntropy)
    assert weights == {"z": pytest.approx(2e-4), "ce": 1.0}
    assert without_teacher({"kd": ForwardKL()}, {"kd": 1.0})[1] == {"ce": 1.0}


def test_terms_are_looked_at() -> None:
    with pytest.raises(ConfigError, match="is empty; give at least one term"):
        check({}, True)
    with pytest.raises(ConfigError, match=r"\['lr'\] are names of the log"):
        check({"lr": CrossEntropy()}, True)
    with pytest.raises(ConfigError, match=r"\['kd'\] need a teacher"):
        check({"ce": CrossEntropy(), "kd": ForwardKL()}, False)


def test_a_checkpoint_must_hold_what_the_terms_learned() -> None:
    losses = nn.ModuleDict({"kd": ForwardKL(), "own": nn.Linear(1, 1)})
    good = {f"losses.{key}": value for key, value in losses.state_dict().items()} | {"student.w": torch.ones(1)}
    check_checkpoint(losses, good)
    with pytest.raises(ConfigError, match=r"in \['own'\]"):
        check_checkpoint(losses, {"student.w": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"in \['other'\]"):
        check_checkpoint(losses, good | {"losses.other.w": torch.ones(1)})


def test_figures_of_every_term() -> None:
    measured = Measured({"ce": 2.0, "kd": 3.0}, {"ce": 0.1, "kd": 0.2}, torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
    found = figures({"ce": CrossEntropy(), "kd": ForwardKL(4.0)}, {"ce": 0.5, "kd": 2.0}, measured)
    assert found == {
        "train/kd_temperature": 4.0,
        "train/ce_weight": 0.5,
        "train/kd_weight": 2.0,
        "train/ce_weighted": 1.0,
        "train/kd_weighted": 6.0,
        "train/ce_grad_norm": 0.1,
        "train/kd_grad_norm": 0.2,
    }
    assert measured.gram is not None
    exact = exact_figures({"ce": CrossEntropy(), "kd": ForwardKL()}, measured.gram)
    assert exact == {"train/ce_grad_norm_exact": 2.0, "train/kd_grad_norm_exact": 3.0}
