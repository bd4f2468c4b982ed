from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest

from distill.report.page import plots
from distill.report.page.plots import Style, curve, dots_with_intervals, label_points, legend, new, styles


def test_a_plot_is_never_too_wide_for_a_phone_and_nothing_global_changes() -> None:
    before = dict(mpl.rcParams)
    for width, columns, inches in ((6.4, 1, 4.8), (3.0, 1, 3.0), (12.0, 2, 9.6), (7.0, 2, 7.0)):
        figure, axes = new(width, 3.0, columns)
        assert figure.get_size_inches().tolist() == [inches, 3.0]
        assert len(axes) == columns
    assert dict(mpl.rcParams) == before


def test_twelve_models_look_different_and_the_first_as_always() -> None:
    looks = styles(f"model {i}" for i in range(12))
    assert len(set(looks.values())) == 12
    assert styles(["model 0", "other"])["model 0"] == looks["model 0"]


def test_a_curve_has_its_band_and_few_points_are_marked() -> None:
    _, (axes,) = new()
    curve(axes, [1, 2], [3, 4], Style("#0f5fbf", "--", "s"), "a", [2, 3], [4, 5])
    curve(axes, range(100), range(100), Style("#0f5fbf", "-", "o"), "b")
    few, many = axes.get_lines()
    assert (few.get_marker(), few.get_linestyle(), many.get_marker()) == ("s", "--", "")
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).extents.tolist() == [1, 2, 2, 5]


def test_dots_stand_at_their_figures_and_what_was_not_measured_keeps_its_row() -> None:
    _, (axes,) = new()
    dots_with_intervals(axes, {"a": {"value": 2.0, "low": 1.0, "high": 4.0}, "b": {"missing": "why"}, "c": None, "d": 3.0}, text=str)
    drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert drawn == [[[1, 0], [4, 0]], [[2, 0]], [[3, 3], [3, 3]], [[3, 3]]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c", "d"]
    assert [text.get_text() for text in axes.texts] == ["2.0", "3.0"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is at the top


def test_a_legend_covers_neither_lines_nor_title() -> None:
    figure, (axes,) = new()
    axes.set_title("a title", loc="left")
    for name in "abc":
        axes.plot([0, 1], [0, 1], label=name)
    legend(axes)
    figure.draw_without_rendering()
    box = axes.get_legend().get_window_extent()
    (title,) = [child for child in axes.get_children() if getattr(child, "get_text", str)() == "a title"]
    assert box.y0 >= axes.get_window_extent().y1
    assert box.y1 <= title.get_window_extent().y0 + 1


@pytest.mark.parametrize("seed", range(3))
def test_names_of_points_cover_no_other_name_point_or_step(seed: int) -> None:
    figure, (axes,) = new()
    points = {f"model {i}": (float(x), float(y)) for i, (x, y) in enumerate(np.random.default_rng(seed).uniform(size=(6, 2)))}
    points["beside model 0"] = (points["model 0"][0] + 0.02, points["model 0"][1] + 0.01)
    for x, y in points.values():
        axes.plot([x], [y], marker="o")
    axes.step([0, 1], [0.5, 0.5], where="post")
    low, high = points["model 1"][1] - 0.1, points["model 1"][1] + 0.1
    axes.errorbar([points["model 1"][0]], [points["model 1"][1]], [[0.1], [0.1]])
    axes.margins(0.15)
    label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list(points)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    where = axes.transData.transform(list(points.values()))
    assert not any(box.contains(*at) for box in boxes for at in where)
    step = axes.transData.transform((0, 0.5))[1]
    assert not any(box.y0 < step < box.y1 for box in boxes)
    (x, bottom), (_, top) = axes.transData.transform([(points["model 1"][0], low), (points["model 1"][0], high)])
    assert not any(box.x0 < x < box.x1 and box.y0 < top and box.y1 > bottom for box in boxes)


# Colour vision: Machado, Oliveira & Fernandes, IEEE TVCG 2009, severity 1, on linear RGB; distance in OKLab (Ottosson, 2020), times 100.
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_CONES = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
TO_LAB = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])


def linear(color: str) -> np.ndarray:
    part = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def seen(color: str, vision: str) -> np.ndarray:
    return 100 * TO_LAB @ np.cbrt(TO_CONES @ np.clip(np.array(VISION[vision]) @ linear(color), 0, 1))


def palettes() -> dict[str, list[str]]:
    """Both, as the style sheet has them."""
    import re
    from importlib import resources

    style = resources.files("distill.report.page").joinpath("style.css").read_text(encoding="utf-8")
    found = re.findall(r"--plot-\d: (#[0-9a-f]{6})", style)
    return {"light": found[:6], "dark": found[6:]}


def test_the_style_sheet_has_the_colours_of_the_plots() -> None:
    assert palettes()["light"] == list(plots.PALETTE)
    assert len(palettes()["dark"]) == 6


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_are_apart_for_every_kind_of_vision(mode: str, vision: str) -> None:
    far = [np.linalg.norm(seen(a, vision) - seen(b, vision)) for a, b in combinations(palettes()[mode], 2)]
    assert min(far) > 8  # of Okabe and Ito's own eight colours it is 7.6
