"""What is left of the accuracy when the input is disturbed, by an opponent, by noise, by wrong tokens: the student beside its teacher."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from distill.report.evidence import TEACHER, Evidence
from distill.report.page import plots
from distill.report.page.blocks import Block, Fold, Grid, Missing, Note, Picture
from distill.report.page.words import percent
from distill.report.probes.robustness import PGD_STEPS, measure
from distill.report.sections.base import Section

CALLED = {
    "margin": "features moved against the head",
    "fgsm": "attack in one step (FGSM)",
    "pgd": f"attack in {PGD_STEPS} steps (PGD)",
    "noise": "noise on the embeddings",
    "replaced": "wrong tokens",
}
SHORT = {
    "margin": "margin, ε = {:g}",
    "fgsm": "FGSM, ε = {:g}",
    "pgd": "PGD, ε = {:g}",
    "noise": "noise, σ = {:g}",
    "replaced": "wrong tokens, share {:g}",
}
PANELS = {
    "margin": ("Features moved against the head", "ε, in RMS of the features"),
    "pgd": ("Attack on the embeddings", "ε, in RMS of the embeddings"),
    "noise": ("Noise on the embeddings", "σ, in RMS of the embeddings"),
    "replaced": ("Wrong tokens", "tokens replaced, %"),
}


class Robustness(Section):
    """Accuracy under the ℓ∞ margin of a linear head, FGSM and PGD, noise, and replaced tokens."""

    name: ClassVar[str] = "robustness"
    title: ClassVar[str] = "Robustness"
    question: ClassVar[str] = "Does the student fall faster than its teacher when the input is disturbed?"
    order: ClassVar[int] = 40

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Disturb some rows, and count what is still right."""
        return measure(evidence)

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """Who falls faster, the curves, the table."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, test in figures["tests"].items():
            for who, one in test["models"].items():
                if "missing" in one:
                    reasons.setdefault((who, one["missing"]), []).append(CALLED[name])
        missing = [Missing(f"the {who}: {', '.join(names)}", why) for (who, why), names in reasons.items()]
        missing += [Missing(f"robustness of the {who}", why) for who, why in figures["absent"].items()]
        pictures = [panel for name in PANELS if (panel := _panel(name, figures)) is not None]
        shown: list[Block] = [Picture(pictures, _alt(figures), _caption(figures))] if pictures else []
        return [sentence(figures), *shown, _table(figures), Fold("Accuracy at every strength", _listed(figures)), *missing]


def sentence(figures: Mapping[str, Any]) -> Note:
    """Who falls faster, where the rows tell."""
    student, tests = figures["student"], figures["tests"]
    measured = {name: test for name, test in tests.items() if "missing" not in test["difference"]}
    if not measured:
        alone = next((who for test in tests.values() for who, one in test["models"].items() if "missing" not in one), None)
        if alone is None:
            return Note("None of the tests could be made.", "warning")
        return Note(f"The {alone} stands alone: {_keeps(tests, alone)}.", "plain")
    faster = [name for name, test in measured.items() if test["difference"]["high"] < 0]
    slower = [name for name, test in measured.items() if test["difference"]["low"] > 0]
    if faster:
        worst = min(faster, key=lambda name: measured[name]["difference"]["value"])
        others = [CALLED[name] for name in faster if name != worst]
        also = f" It falls faster also under: {', '.join(others)}." if others else ""
        return Note(
            f"The {student} falls faster than its teacher under {CALLED[worst]}: {_both(measured[worst], student)}.{also}", "warning"
        )
    if slower:
        best = max(slower, key=lambda name: measured[name]["difference"]["value"])
        text = f"The {student} falls no faster than its teacher, and slower under {CALLED[best]}: {_both(measured[best], student)}."
        return Note(text, "good")
    lowest = min(measured, key=lambda name: measured[name]["difference"]["low"])
    low = max(0.0, -100 * measured[lowest]["difference"]["low"])
    return Note(
        f"These rows show no test under which the {student} falls faster than its teacher; under {CALLED[lowest]}, the least certain, "
        f"{_both(measured[lowest], student)}, and it may keep up to {low:.0f} points less.",
        "plain",
    )


def _both(test: Mapping[str, Any], student: str) -> str:
    kept = {who: percent(one["kept"]["value"], 0) for who, one in test["models"].items()}
    return f"on average over the strengths it keeps {kept[student]} of its accuracy, the teacher {kept[TEACHER]}"


def _keeps(tests: Mapping[str, Any], who: str) -> str:
    there = {name: test["models"][who] for name, test in tests.items() if "missing" not in test["models"].get(who, {"missing": ""})}
    kept = [f"{percent(one['kept'], 0)} under {CALLED[name]}" for name, one in there.items() if "missing" not in one["kept"]]
    return f"on average over the strengths it keeps of its accuracy {'; '.join(kept)}" if kept else "undisturbed it is never right"


def _panel(name: str, figures: Mapping[str, Any]) -> Figure | None:
    looks = {who: look for who, look in plots.styles(figures["names"]).items() if who in (TEACHER, figures["student"])}
    figure, (axes,) = plots.new(4.4, 3.0)
    strengths = _strengths(name, figures["tests"][name])
    drawn = [_draw(axes, strengths, figures["tests"][name], who, look) for who, look in looks.items()]
    if name == "pgd":
        drawn += [
            _draw(axes, figures["tests"]["fgsm"]["strengths"], figures["tests"]["fgsm"], who, look, faint=True)
            for who, look in looks.items()
        ]
    if not any(drawn):
        return None
    title, label = PANELS[name]
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel=label, ylabel="accuracy, %")
    axes.set_xticks(strengths, [f"{x:g}" for x in strengths])
    axes.set_ylim(bottom=0)
    plots.legend(axes)
    return figure


def _strengths(name: str, test: Mapping[str, Any]) -> list[float]:
    return [(100 if name == "replaced" else 1) * strength for strength in test["strengths"]]


def _draw(axes: Any, x: list[float], test: Mapping[str, Any], who: str, look: plots.Style, faint: bool = False) -> bool:
    one = test["models"].get(who, {"missing": ""})
    if "missing" in one or any("missing" in accuracy for accuracy in one["accuracy"]):
        return False
    value, low, high = (100 * np.array([accuracy[key] for accuracy in one["accuracy"]]) for key in ("value", "low", "high"))
    if faint:
        axes.plot(x, value, color=look.color, linestyle=":", linewidth=1.2, marker=look.marker, markersize=3)
    else:
        plots.curve(axes, x, value, look, who, low, high)
    return True


def _table(figures: Mapping[str, Any]) -> Grid:
    """What is kept on average, a test a row."""
    names = _shown(figures)
    both = len(names) == 2
    rows = []
    for name, test in figures["tests"].items():
        found = [test["models"].get(who, {"missing": ""}) for who in names]
        cells = ["" if "missing" in one else percent(one["kept"]) for one in found]
        rows.append([SHORT[name].split(",")[0], *cells, *([_points(test["difference"])] if both else [])])
    return Grid(["accuracy kept under", *names, *(["difference, points"] if both else [])], rows, _how(figures))


def _listed(figures: Mapping[str, Any]) -> str:
    """The accuracy at every strength, in columns."""
    names = _shown(figures)
    lines = [["", *names]]
    for name, test in figures["tests"].items():
        found = [test["models"].get(who, {"missing": ""}) for who in names]
        for i, strength in enumerate(test["strengths"]):
            cells = ["" if "missing" in one else percent(one["accuracy"][i]) for one in found]
            lines.append([SHORT[name].format(strength), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _shown(figures: Mapping[str, Any]) -> list[str]:
    return [name for name in (TEACHER, figures["student"]) if name not in figures["absent"]]


def _points(figure: Mapping[str, float]) -> str:
    if "missing" in figure:
        return ""
    return f"{100 * figure['value']:+.1f} ({100 * figure['low']:+.1f} – {100 * figure['high']:+.1f})".replace("-", "−")


def _how(figures: Mapping[str, Any]) -> str:
    rows, positions, unit = figures["rows"], figures["positions"], figures["unit"]
    bounds = {note for one in figures["tests"]["margin"]["models"].values() if (note := one.get("note"))}
    return (
        f"The share of its own undisturbed accuracy {'of the next token ' if unit == 'token' else ''}that a model keeps on average over "
        f"the strengths, with 95 % intervals. The attacks on {rows['attacked']:,} of {figures['of_rows']:,} held-out rows "
        f"({positions['attacked']:,} {unit}s), the rest on {rows['disturbed']:,} ({positions['disturbed']:,} {unit}s), the same for both "
        "models. ε and σ are in units of the root mean square (RMS) of each model's own embeddings, or of the features before its head; "
        "tokens are replaced by others of these rows, special ones are left."
        f"{''.join(f' The margin is {note}.' for note in sorted(bounds))}"
    )


def _caption(figures: Mapping[str, Any]) -> str:
    return (
        "Accuracy against the strength of four disturbances, with bands of 95 % intervals. The first is a guarantee: what is counted stays "
        "right whatever moves the features before the head by ε. In the second an opponent who knows the gradients moves the embeddings "
        f"({PGD_STEPS} steps of PGD; dotted: one step, FGSM). The others are accidents."
    )


def _alt(figures: Mapping[str, Any]) -> str:
    parts = [
        f"{CALLED[name]}: {who} from {percent(one['accuracy'][0].get('value'))} to {percent(one['accuracy'][-1].get('value'))}"
        for name, test in figures["tests"].items()
        for who, one in test["models"].items()
        if "missing" not in one
    ]
    return f"Lines of accuracy against strength. {'; '.join(parts)}."
