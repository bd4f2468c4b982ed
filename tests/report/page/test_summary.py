from copy import deepcopy
from typing import Any

import pytest

from distill.report.page.blocks import Block, Missing, Note, Tiles
from distill.report.page.summary import blocks, find, reason


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


SECTIONS: dict[str, Any] = {
    "quality": {
        "student": "student distilled",
        "models": {"student distilled": {"retention": interval(0.8629, 0.8492, 0.8784)}},
        "gap_closed": {"from": "student alone", "accuracy": interval(0.4879, 0.441, 0.539)},
    },
    "fidelity": {"models": {"student distilled": {"agreement": interval(0.6064, 0.598, 0.616)}}},
    "calibration": {
        "models": {
            "student distilled": {
                "overconfidence": interval(0.012, 0.007, 0.016),
                "confidence": interval(0.1993, 0.19, 0.21),
                "accuracy": interval(0.1869, 0.17, 0.2),
            }
        }
    },
    "cost": {
        "models": {"teacher": {"bytes": 8_067_840, "latency_ms": 83.38}, "student distilled": {"bytes": 920_960, "latency_ms": 12.72}},
        "ratios": {"bytes": 8.76, "latency": interval(6.555, 5.9, 7.13)},
    },
}


def changed(**figures: Any) -> dict[str, Any]:
    """The sections with some figures changed, by path with two underlines between the keys."""
    made = deepcopy(SECTIONS)
    for path, figure in figures.items():
        *keys, last = [key.replace("distilled", "student distilled") for key in path.split("__")]
        place = made
        for key in keys:
            place = place[key]
        place[last] = figure
    return made


def note(shown: list[Block]) -> Note:
    assert isinstance(shown[0], Note)
    return shown[0]


def tiles(shown: list[Block]) -> dict[str, tuple[str, str]]:
    return {tile.label: (tile.value, tile.detail) for block in shown if isinstance(block, Tiles) for tile in block.tiles}


def missing(shown: list[Block]) -> list[tuple[str, str]]:
    return [(block.what, block.why) for block in shown if isinstance(block, Missing)]


def test_all_of_it_in_a_sentence_and_in_large_figures() -> None:
    shown = blocks(SECTIONS)
    assert note(shown) == Note(
        "The student keeps 86 % (85 – 88) of the teacher's accuracy at 11 % of its size and 6.6× its speed. "
        "It is more certain than it has a right to be.",
        "warning",
    )
    assert tiles(shown) == {
        "accuracy kept": ("86.3 %", "84.9 – 87.8 · of the teacher's"),
        "gap closed": ("49 %", "44 – 54 · of the way from the student alone to the teacher"),
        "size": ("11.4 %", "921 kB, the teacher's 8.07 MB"),
        "speed": ("6.6×", "5.9 – 7.1 · 12.7 ms, the teacher's 83.4 ms"),
        "agreement": ("60.6 %", "59.8 – 61.6 · the teacher's first choice"),
        "calibration": ("too sure", "says 19.9 % on average, is right in 18.7 %"),
    }
    assert missing(shown) == []


NEARLY_ALL, SOME = interval(0.98, 0.96, 1.01), interval(0.9, 0.88, 0.96)
SURE, FAIR, SHY = interval(0.02, 0.01, 0.03), interval(0.002, -0.01, 0.01), interval(-0.02, -0.03, -0.01)


@pytest.mark.parametrize(
    ("kept", "over", "tone", "said"),
    [
        (NEARLY_ALL, SURE, "plain", "It is more certain than it has a right to be."),
        (NEARLY_ALL, FAIR, "good", "It is as certain as it has a right to be."),
        (NEARLY_ALL, SHY, "good", "It is less certain than it could be."),
        (SOME, SURE, "warning", "It is more certain than it has a right to be."),
        (SOME, FAIR, "plain", "It is as certain as it has a right to be."),
        (SOME, interval(-0.04, -0.11, 0.03), "plain", "Too few rows say whether it is as certain as it has a right to be."),
    ],
)
def test_what_is_good_and_what_is_a_warning(kept: Any, over: Any, tone: str, said: str) -> None:
    shown = note(blocks(changed(quality__models__distilled__retention=kept, calibration__models__distilled__overconfidence=over)))
    assert shown.tone == tone
    assert shown.text.endswith(said)


@pytest.mark.parametrize(
    ("gained", "tone", "said", "tile"),
    [
        (interval(0.123, 0.1, 0.15), "good", "Trained alone it is 12.3 points (10.0 – 15.0) worse.", ("+12.3", "+10.0 – +15.0")),
        (interval(0.01, -0.01, 0.03), "good", "It is not clearly better than the same student trained alone.", ("+1.0", "−1.0 – +3.0")),
        (interval(-0.2, -0.25, -0.1), "warning", "Trained alone it is better, by 20.0 points (10.0 – 25.0).", ("−20.0", "−25.0 – −10.0")),
    ],
)
def test_what_the_teacher_was_good_for(gained: Any, tone: str, said: str, tile: tuple[str, str]) -> None:
    figures = changed(quality__models__distilled__retention=NEARLY_ALL, calibration__models__distilled__overconfidence=FAIR)
    figures["quality"]["over_alone"] = gained
    shown = blocks(figures)
    assert note(shown).tone == tone
    assert said in note(shown).text
    assert tiles(shown)["distilling"] == (tile[0], f"{tile[1]} · points over the same student alone")


def test_what_was_not_measured_is_left_out_and_the_reason_said_once() -> None:
    why = {"missing": "there is no teacher"}
    shown = blocks(changed(quality__models__distilled__retention=why, quality__gap_closed=why, fidelity=why, cost__ratios=why))
    assert note(shown).text == "How the student compares with a teacher is not known. It is more certain than it has a right to be."
    assert list(tiles(shown)) == ["calibration"]
    assert missing(shown) == [("Accuracy kept, gap closed, size, speed, agreement", "there is no teacher")]


def test_cost_alone_makes_a_sentence() -> None:
    shown = blocks({"cost": SECTIONS["cost"]})
    assert note(shown).text == "The student has 11 % of the teacher's size and 6.6× the teacher's speed."
    assert list(tiles(shown)) == ["size", "speed"]


def test_nothing_at_all_makes_a_sentence_too() -> None:
    assert blocks({}) == [Note("How the student compares with a teacher is not known.")]


def test_figures_are_found_by_their_keys() -> None:
    figures = {"a": {"b": 1, "c": {"missing": "why"}}, "d": {"missing": "no"}}
    assert find(figures, "a", "b") == 1
    for path in (("a", "c"), ("a", "x"), ("d", "e"), ("a", "b", "c"), ("x", "y")):
        assert find(figures, *path) is None
    assert reason(figures, "a", "c") == "why"
    assert reason(figures, "d", "e", "f") == "no"
    assert reason(figures, "a", "b", "c") is reason(figures, "x", "y") is None
