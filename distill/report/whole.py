"""The report of a run: every chapter asked, `report.json` and `report.html` written."""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.report import rows
from distill.report.evidence import Evidence, NotMeasured
from distill.report.files import write_json, write_text
from distill.report.page import summary
from distill.report.page.blocks import Block, Missing
from distill.report.page.render import Chapter, page
from distill.report.progress import steps
from distill.report.publish import publish_again
from distill.report.sections import all_sections
from distill.report.sections.base import Section

SUBTITLE = "A student and its teacher, on rows that the student was not trained on"


def write(evidence: Evidence, suffix: str = "", wandb: str | None = None) -> Path:
    """Measure all there is to measure, and write `report.json`, `report.html` and `report_rows.npz` into the run's folder.

    Args:
        evidence: of the run.
        suffix: of the files' names, of a report that is not of the final student.
        wandb: project of Weights & Biases in which the run shows it; None for none.

    Returns:
        The page.
    """
    report = {**evidence.run, "sections": measure(evidence)}
    write_json(evidence.folder / f"report{suffix}.json", report)
    rows.save(evidence.folder, evidence.observed, suffix)
    path = evidence.folder / f"report{suffix}.html"
    chapters = told(report)
    write_text(path, page(f"Report of {evidence.folder.name}", SUBTITLE, chapters, facts(report)))
    if wandb:
        publish_again(wandb, evidence.folder, report, chapters, suffix)
    return path


def measure(evidence: Evidence) -> dict[str, Any]:
    """Ask every chapter for its figures; one that fails says so in its place, and takes no other with it."""
    found: dict[str, Any] = {}
    for section in steps(all_sections(), lambda each: each.title.split(":")[0]):
        try:
            found[section.name] = section.figures(evidence)
        except NotMeasured as error:
            found[section.name] = {"missing": str(error)}
        except Exception as error:  # the run is done and safe, and the other chapters are worth having
            traceback.print_exc(file=sys.stderr)
            found[section.name] = {"missing": f"this chapter failed: {type(error).__name__}: {error}"}
    return found


def told(report: Mapping[str, Any]) -> list[Chapter]:
    """Make the chapters out of a `report.json`, without any model."""
    figures = report["sections"]
    chapters = [Chapter("summary", "Summary", "May it be served in place of the teacher?", summary.blocks(figures))]
    return chapters + [
        Chapter(section.name, section.title, section.question, _blocks(section, figures[section.name]))
        for section in all_sections()
        if section.name in figures
    ]


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """What the page is of, in a few words."""
    # a run that noted nothing is looked at now, by the chapter on provenance
    made = report.get("fingerprints") or report["sections"].get("provenance", {}).get("code", {})
    return {"steps": f"{report['steps']:,}"} | {
        "data" if key == "data" else "distill": str(made[key]) for key in ("data", "version") if key in made
    }


def _blocks(section: Section, figures: dict[str, Any]) -> list[Block]:
    title = section.title.split(":")[0]
    if "missing" in figures:
        return [Missing(title, figures["missing"])]
    try:
        return section.blocks(figures)
    except Exception as error:  # the figures are safe in report.json, and the other chapters are worth having
        traceback.print_exc(file=sys.stderr)
        return [Missing(title, f"its figures are in report.json, but could not be shown: {type(error).__name__}: {error}")]
