import pytest
import torch
from torch import nn

from distill.losses.projector import FullLinear, describe, full, projector
from distill.types import ConfigError

KEY = "model.losses.hidden.projector"


@pytest.mark.parametrize(
    ("kind", "widths", "shapes", "text"),
    [
        ("auto", (6, 6), [], "no projector"),
        ("auto", (6, 10), [(10, 6)], "linear 6→10"),
        ("none", (6, 6), [], "no projector"),
        ("linear", (6, 6), [(6, 6)], "linear 6→6"),
        ("mlp", (6, 10), [(10, 6), (10,), (10, 10), (10,)], "mlp 6→10"),
    ],
)
def test_kinds(kind: str, widths: tuple[int, int], shapes: list[tuple[int, ...]], text: str) -> None:
    made = projector(kind, *widths, KEY)  # type: ignore[arg-type]
    assert [tuple(p.shape) for p in made.parameters()] == shapes
    assert describe(made) == text
    assert made(torch.zeros(2, 3, widths[0])).shape == (2, 3, widths[1])


def test_linear_is_that_of_torch_without_a_bias() -> None:
    made = projector("linear", 3, 2, KEY)
    assert isinstance(made, nn.Linear)
    x = torch.randn(4, 3)
    torch.testing.assert_close(made(x), x @ made.weight.T)


def test_mlp_bends() -> None:
    made = projector("mlp", 3, 2, KEY)
    x = torch.randn(4, 3)
    plain = nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Linear(2, 2))
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(x), plain(x))


def test_none_for_different_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses\.hidden\.projector: the student is 6 wide and the teacher 10, so none cannot work"):
        projector("none", 6, 10, KEY)


@pytest.mark.parametrize(
    ("given", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_precision_is_that_of_the_input(given: torch.dtype, wanted: torch.dtype) -> None:
    assert full(torch.ones(2, dtype=given)).dtype == wanted
    layer = FullLinear(2, 3).bfloat16()
    assert layer(torch.ones(1, 2, dtype=wanted)).dtype == wanted
