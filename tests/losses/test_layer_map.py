from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser

from distill.losses.features import HiddenMSE
from distill.losses.layer_map import match_hidden, pairs
from distill.types import ConfigError
from tests.losses.taps import setting

KEY = "model.losses.hidden.layers"


@pytest.mark.parametrize(
    ("rule", "counts", "expected"),
    [
        ("last", (4, 12), [(4, 12)]),
        ("uniform", (4, 12), [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]),  # TinyBERT's g(m) = 3 m
        ("uniform", (2, 5), [(0, 0), (1, 3), (2, 5)]),  # 2.5 goes up
        ("uniform", (4, 6), [(0, 0), (1, 2), (2, 3), (3, 5), (4, 6)]),
        ("uniform", (6, 2), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]),  # never a layer with the embeddings
        ("every_other", (3, 6), [(1, 2), (2, 4), (3, 6)]),
        ("every_other", (2, 6), [(1, 2), (2, 4)]),
        ([(0, 0), (2, 5), (-1, -2), (-5, -13)], (4, 12), [(0, 0), (2, 5), (4, 11), (0, 0)]),
    ],
)
def test_rules(rule: Any, counts: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert pairs(rule, *counts, KEY) == expected


def test_attention_has_no_layer_0() -> None:
    assert pairs("uniform", 2, 4, KEY, first=1) == [(1, 2), (2, 4)]
    assert pairs([(-2, -4)], 2, 4, KEY, first=1) == [(1, 1)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_uniform_is_monotone_and_ends_at_the_last(student: int, teacher: int) -> None:
    found = pairs("uniform", student, teacher, KEY, first=1)
    assert [s for s, _ in found] == list(range(1, student + 1))
    assert [t for _, t in found] == sorted(t for _, t in found)
    assert found[-1] == (student, teacher)
    assert all(abs(t - s * teacher / student) <= 0.5 or t == 1 for s, t in found)


@pytest.mark.parametrize(
    ("rule", "counts", "message"),
    [
        ([(3, 1)], (2, 4), r"student layer 3 is out of range; there are 0 to 2, or -3 to -1 from the end"),
        ([(1, 1), (1, 5)], (2, 4), r"teacher layer 5 is out of range; there are 0 to 4, or -5 to -1"),
        ([(-4, 1)], (2, 4), r"student layer -4 is out of range"),
        ([], (2, 4), "is empty; give at least one pair"),
        ("every_other", (3, 5), r"every_other needs 6 teacher layers for 3 student layers, but there are 5"),
        ("last", (0, 5), r"the layers of the student are in no list of modules.*give pairs of names"),
        ("uniform", (5, 0), r"the layers of the teacher are in no list"),
    ],
)
def test_what_cannot_be_matched(rule: Any, counts: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.losses\.hidden\.layers:? .*{message}|model\.losses\.hidden\.layers {message}"):
        pairs(rule, *counts, KEY)


def test_names() -> None:
    (match,) = match_hidden([("layers.0.up", "layers.3.mlp")], setting())
    assert (match.taps, match.widths) == (("layers.0.up", "layers.3.mlp"), (9, 10))
    assert match.text == "student layers.0.up ↔ teacher layers.3.mlp"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"it\.layers: model\.teacher has no submodule 'layers\.3\.mpl' .*Did you mean 'layers\.3\.mlp'"):
        match_hidden([("layers.0.up", "layers.3.mpl")], setting())
    with pytest.raises(ConfigError, match=r"it\.layers: model\.student has no submodule ':input'"):
        match_hidden([(":input", "layers.3.mlp")], setting())


def parse(layers: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(HiddenMSE, "loss")
    config = f'{{"class_path": "distill.losses.features.HiddenMSE", "init_args": {{"layers": {layers}}}}}'
    return parser.instantiate_classes(parser.parse_args([f"--loss={config}"])).loss.layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"every_other"', "every_other"),
        ("[[1, 2], [-1, -1]]", [(1, 2), (-1, -1)]),
        ('[["model.layers.0.mlp", "model.layers.3.mlp"]]', [("model.layers.0.mlp", "model.layers.3.mlp")]),
    ],
)
def test_every_form_is_written_in_yaml(text: str, expected: Any) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ['"first"', "[[1, 2, 3]]", "[1, 2]"])
def test_other_forms_are_refused_by_the_parser(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse(text)
