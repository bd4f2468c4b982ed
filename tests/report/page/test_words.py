import math

import pytest

from distill.report.page import words

INTERVAL = {"value": 0.8629, "low": 0.8511, "high": 0.8741}


def test_a_share_with_its_interval_and_alone() -> None:
    assert words.percent(INTERVAL) == "86.3 % (85.1 – 87.4)"
    assert words.percent(INTERVAL, 0) == "86 % (85 – 87)"
    assert words.percent(0.8629) == "86.3 %"


def test_a_number_with_its_interval_and_unit() -> None:
    assert words.number(INTERVAL, unit="nats") == "0.863 nats (0.851 – 0.874)"
    assert words.number({"value": -1.25, "low": -2.0, "high": 0.5}, 1) == "−1.2 (−2.0 – 0.5)"


@pytest.mark.parametrize("text", [words.percent, words.number, words.count, words.size, words.duration, words.milliseconds, words.ratio])
@pytest.mark.parametrize("figure", [None, math.nan, {"missing": "why"}])
def test_what_was_not_measured_is_no_text(text, figure) -> None:
    assert text(figure) == ""


@pytest.mark.parametrize(
    ("figure", "text"), [(0, "0"), (34251.0, "34,251"), (999_999, "999,999"), (2_016_960, "2.02 M"), (7_615_616_512, "7.62 B")]
)
def test_counts(figure, text) -> None:
    assert words.count(figure) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (918_784, "919 kB"),
        (999_700, "1.00 MB"),
        (8_067_840, "8.07 MB"),
        (14.2e9, "14.2 GB"),
        (3e15, "3,000 TB"),
    ],
)
def test_sizes(figure, text) -> None:
    assert words.size(figure) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (31e-6, "31.0 µs"),
        (0.0042, "4.20 ms"),
        (0.9996, "1.00 s"),
        (59.4, "59.4 s"),
        (59.96, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_durations(seconds, text) -> None:
    assert words.duration(seconds) == text
    assert words.milliseconds(1000 * seconds) == text


@pytest.mark.parametrize(("figure", "text"), [(8.781, "8.8×"), (0.5, "0.50×"), (12.34, "12×"), (1234.0, "1,234×")])
def test_ratios(figure, text) -> None:
    assert words.ratio(figure) == text


def test_a_ratio_with_its_interval() -> None:
    assert words.ratio({"value": 6.21, "low": 5.9, "high": 6.44}) == "6.2× (5.9 – 6.4)"
