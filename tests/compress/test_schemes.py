"""Schemes by name, and what is wrong with a choice."""

import pytest
import torch
from torch import nn

from distill.compress.schemes import SCHEMES, Scheme, check_groups, check_machine, scheme
from distill.types import ConfigError

KEY = "trainer.callbacks: QuantizationAwareTraining"


def test_group_sizes() -> None:
    assert scheme("int4", None, KEY) == Scheme("int", 4, 32)
    assert scheme("int4", 64, KEY) == Scheme("int", 4, 64)
    assert scheme("int3", "row", KEY) == Scheme("int", 3, None)
    assert scheme("ternary", 16, KEY).group_size == 16
    assert scheme("int8", None, KEY) == Scheme("int", 8, None, inputs=True)


@pytest.mark.parametrize(
    ("name", "group_size", "said"),
    [
        ("int-4", None, r"QuantizationAwareTraining\.scheme: there is no 'int-4'. Did you mean 'int4'\?; there are int8, int8-int4"),
        ("int4", 1, r"group_size must be at least 2, got 1; 'row' gives each row one scale"),
        ("fp8", 32, r"group_size is 32, but fp8 does without; leave it out"),
        ("ternary", "row", r"group_size is row, but ternary does without; leave it out"),
    ],
)
def test_a_wrong_choice_is_one_clear_line(name: str, group_size: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scheme(name, group_size, KEY)


def test_groups_that_do_not_fill_a_row_name_the_layer_and_the_fix() -> None:
    layers = {"mlp.up": nn.Linear(64, 172), "mlp.down": nn.Linear(172, 64)}
    how = dict.fromkeys(layers, SCHEMES["int4"])
    with pytest.raises(
        ConfigError, match=r"group_size is 32, which does not divide the 172 inputs of 'mlp\.down'; set group_size: 4, which"
    ):
        check_groups(layers, how, KEY)
    odd = {"five": nn.Linear(5, 2), "seven": nn.Linear(7, 2)}
    with pytest.raises(ConfigError, match="the 5 inputs of 'five'; set group_size: row, or exclude the layer"):
        check_groups(odd, dict.fromkeys(odd, SCHEMES["int4"]), KEY)
    check_groups(layers, dict.fromkeys(layers, scheme("int4", "row", KEY)), KEY)


@pytest.mark.parametrize(("capability", "said"), [(None, "there is no GPU"), ((8, 0), "this one has 8.0")])
def test_fp8_needs_its_kernels(capability: tuple[int, int] | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ConfigError, match=rf"fp8 needs a GPU of compute capability 8.9 or newer.*{said}; take int8"):
        check_machine({"a": SCHEMES["fp8"]}, KEY)
    check_machine({"a": SCHEMES["int8"]}, KEY)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    if capability:
        check_machine({"a": SCHEMES["fp8"]}, KEY)
