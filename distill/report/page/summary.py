"""The first chapter: what the student kept, what it costs, and how sure that is; all of it out of the other chapters' figures."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from distill.report.page.blocks import Block, Missing, Note, Tile, Tiles
from distill.report.page.words import milliseconds, number, percent, ratio, size

Figures = Mapping[str, Any]

TEACHER = "teacher"
NEARLY_ALL = 0.95  # of the teacher's accuracy
SURE = 0.05  # of probability: where the interval of the overconfidence reaches farther, it is not said to be none


class Headlines(NamedTuple):
    """Figures of the final student; each as in `report.json`, or None.

    Attributes:
        kept: accuracy over the teacher's, with its interval.
        gap: the share of the way to the teacher that was gone, with its interval.
        times_smaller: the teacher's bytes over the student's.
        speed: the teacher's latency over the student's, with its interval.
        agreement: how often both have the same likeliest class, with its interval.
        over: mean confidence minus accuracy, with its interval.
        gained: accuracy above that of the same student trained alone, with its interval.
    """

    kept: Any
    gap: Any
    times_smaller: Any
    speed: Any
    agreement: Any
    over: Any
    gained: Any


CALLED = Headlines("accuracy kept", "gap closed", "size", "speed", "agreement", "calibration", "distilling")


def blocks(sections: Mapping[str, Figures]) -> list[Block]:
    """Say it in a sentence or two, and in large figures.

    Args:
        sections: figures of every chapter by its name; one may be absent, or `{"missing": why}`.
    """
    student = next((found["student"] for found in sections.values() if "student" in found), "student distilled")
    places = _places(student)
    told = Headlines(*(find(sections, *place) for place in places))
    shown: list[Block] = [Note(_verdict(told), _tone(told))]
    tiles = _tiles(told, sections, student)
    if tiles:
        shown.append(Tiles(tiles))
    reasons: dict[str, list[str]] = {}
    for called, place, figure in zip(CALLED, places, told, strict=True):
        why = None if figure is not None else reason(sections, *place)
        if why:
            reasons.setdefault(why, []).append(called)
    return shown + [Missing(", ".join(names).capitalize(), why) for why, names in reasons.items()]


def find(figures: Any, *path: str) -> Any:
    """A figure by its keys; None where one is absent, or where it was not measured."""
    for key in path:
        figures = figures.get(key) if isinstance(figures, Mapping) else None
    return None if isinstance(figures, Mapping) and "missing" in figures else figures


def reason(figures: Any, *path: str) -> str | None:
    """Why the figure of these keys was not measured, as the first on the way says; None where none does."""
    for key in path:
        figures = figures.get(key) if isinstance(figures, Mapping) else None
        if isinstance(figures, Mapping) and "missing" in figures:
            return str(figures["missing"])
    return None


def _places(student: str) -> tuple[tuple[str, ...], ...]:
    return Headlines(
        kept=("quality", "models", student, "retention"),
        gap=("quality", "gap_closed", "accuracy"),
        times_smaller=("cost", "ratios", "bytes"),
        speed=("cost", "ratios", "latency"),
        agreement=("fidelity", "models", student, "agreement"),
        over=("calibration", "models", student, "overconfidence"),
        gained=("quality", "over_alone"),
    )


def _verdict(told: Headlines) -> str:
    if told.kept is not None:
        costs = _costs(told, "its")
        first = f"The student keeps {percent(told.kept, 0)} of the teacher's accuracy{f' at {costs}' if costs else ''}."
    elif costs := _costs(told, "the teacher's"):
        first = f"The student has {costs}."
    else:
        first = "How the student compares with a teacher is not known."
    return " ".join(part for part in (first, _use(told.gained), _certainty(told.over)) if part)


def _use(gained: Any) -> str:
    """What the teacher was good for."""
    if gained is None or gained["low"] <= 0 <= gained["high"]:
        return "" if gained is None else "It is not clearly better than the same student trained alone."
    points = number({key: 100 * value for key, value in gained.items()}, 1, "points")
    return f"Trained alone it is {points} worse." if gained["low"] > 0 else f"Trained alone it is better, by {_turned(gained)}."


def _turned(gained: Any) -> str:
    return number({"value": -100 * gained["value"], "low": -100 * gained["high"], "high": -100 * gained["low"]}, 1, "points")


def _costs(told: Headlines, whose: str) -> str:
    costs = []
    if told.times_smaller is not None:
        costs.append(f"{percent(1 / told.times_smaller, 0 if told.times_smaller < 20 else 1)} of {whose} size")
    if told.speed is not None:
        costs.append(f"{ratio(told.speed['value'])} {whose} speed")
    return " and ".join(costs)


def _certainty(over: Any) -> str:
    return {
        "too sure": "It is more certain than it has a right to be.",
        "too cautious": "It is less certain than it could be.",
        "as it should be": "It is as certain as it has a right to be.",
        "not known": "Too few rows say whether it is as certain as it has a right to be.",
        "": "",
    }[_calibration(over)]


def _calibration(over: Any) -> Literal["too sure", "too cautious", "as it should be", "not known", ""]:
    """What the interval of the mean overconfidence says."""
    if over is None:
        return ""
    if over["low"] > 0 or over["high"] < 0:
        return "too sure" if over["low"] > 0 else "too cautious"
    return "as it should be" if max(-over["low"], over["high"]) <= SURE else "not known"


def _tone(told: Headlines) -> Literal["plain", "good", "warning"]:
    """Good where nearly all of the accuracy is surely kept and the student is not too sure; a warning where it is worse and too sure, or
    where the teacher did harm.
    """
    if told.gained is not None and told.gained["high"] < 0:
        return "warning"
    nearly_all = told.kept is not None and told.kept["low"] >= NEARLY_ALL
    too_sure = _calibration(told.over) == "too sure"
    if nearly_all and not too_sure:
        return "good"
    return "warning" if too_sure and not nearly_all else "plain"


def _tiles(told: Headlines, sections: Mapping[str, Figures], student: str) -> list[Tile]:
    tiles = [
        _tile(CALLED.kept, percent(told.kept), "of the teacher's"),
        _tile(CALLED.gained, _signed(told.gained), _over_alone(told.gained)),
        _tile(CALLED.gap, percent(told.gap, 0), f"of the way from the {find(sections, 'quality', 'gap_closed', 'from')} to the teacher"),
        _tile(CALLED.times_smaller, percent(told.times_smaller and 1 / told.times_smaller), _beside(sections, student, "bytes", size)),
        _tile(CALLED.speed, ratio(told.speed), _beside(sections, student, "latency_ms", milliseconds)),
        _tile(CALLED.agreement, percent(told.agreement), "the teacher's first choice"),
        _tile(CALLED.over, _calibration(told.over), _points(sections, student, told.over)),
    ]
    return [tile for tile in tiles if tile.value]


def _tile(label: str, text: str, detail: str) -> Tile:
    """The figure large, its interval below."""
    value, _, interval = text.partition(" (")
    return Tile(label, value, f"{interval.removesuffix(')')} · {detail}" if interval and detail else interval or detail)


def _beside(sections: Mapping[str, Figures], student: str, key: str, text: Any) -> str:
    ours, theirs = (text(find(sections, "cost", "models", name, key)) for name in (student, TEACHER))
    return f"{ours}, the teacher's {theirs}" if ours and theirs else ""


def _signed(gained: Any) -> str:
    return "" if gained is None else f"{100 * gained['value']:+.1f}".replace("-", "−")


def _over_alone(gained: Any) -> str:
    if gained is None:
        return ""
    return f"{100 * gained['low']:+.1f} – {100 * gained['high']:+.1f} · points over the same student alone".replace("-", "−")


def _points(sections: Mapping[str, Figures], student: str, over: Any) -> str:
    if over is None:
        return ""
    confidence, accuracy = (percent(find(sections, "calibration", "models", student, key, "value")) for key in ("confidence", "accuracy"))
    return f"says {confidence} on average, is right in {accuracy}" if confidence and accuracy else ""
