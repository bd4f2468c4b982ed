import pytest
import torch

from distill.losses.support import log_probs
from distill.types import ConfigError


def test_columns_beyond_the_classes_are_left_out_before_the_softmax() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0]])  # the third column would take all the mass
    torch.testing.assert_close(log_probs(logits, 2).exp(), torch.tensor([[0.5, 0.5]]))


def test_same_as_masking_with_minus_infinity() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64)
    masked = logits.clone()
    masked[:, 5:] = -torch.inf
    torch.testing.assert_close(log_probs(logits, 5), masked.log_softmax(-1)[:, :5])


def test_left_out_columns_get_a_gradient_of_exactly_zero() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    log_probs(logits, 5)[:, 2].sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 5:] == 0).all()
    assert logits.grad[:, :5].abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(given: torch.dtype, wanted: torch.dtype) -> None:
    logits = torch.randn(3, 4).to(given)
    found = log_probs(logits, 4)
    assert found.dtype == wanted
    torch.testing.assert_close(found, logits.double().log_softmax(-1).to(wanted))


def test_a_head_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(ConfigError, match="predicts 4 classes, but the data have 5"):
        log_probs(torch.zeros(1, 4), 5)
