"""The report in Weights & Biases: figures in the run's summary, tables, pictures, the page, and all of it as an artifact."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers.logger import Logger

from distill.callbacks.wandb import Tracked, upload, wandb_logger
from distill.report.page.blocks import Grid, Picture
from distill.report.page.render import Chapter

PATIENCE_S = 60.0
SCALARS = 1000  # in the summary: a chapter may have a figure for every class
LEFT_OUT = ("curves", "config", "environment", "left")  # the curves are there as they were logged
FILES = ("report.html", "report.json")


def publish(logger: Logger, folder: Path, report: Mapping[str, Any], chapters: Sequence[Chapter], suffix: str = "") -> bool:
    """Show a report in the run's page, if it has one; takes `PATIENCE_S` at most, and is no reason for anything to fail.

    `report/CHAPTER/FIGURE` in the summary, with `_low` and `_high` beside a figure that has an interval; each table and picture under
    `report/CHAPTER/…`; the page as `report/page`; and the artifact `report-ID` of type `report` with `report.html` and `report.json`.

    Args:
        logger: of the run; one that is not of W&B shows nothing.
        folder: of the run, with the files of the report.
        report: `report.json`.
        chapters: of the page.
        suffix: of the files' names.

    Returns:
        Whether W&B has it.
    """
    if not isinstance(logger, Tracked):
        return False
    files = [folder / f"{Path(name).stem}{suffix}{Path(name).suffix}" for name in FILES]
    return logger.within(PATIENCE_S, "THE REPORT", files[0], lambda run: _publish(run, files, report, chapters))


def publish_again(project: str, folder: Path, report: Mapping[str, Any], chapters: Sequence[Chapter], suffix: str = "") -> bool:
    """The same for a run that ended long ago: its W&B run, by the id in `folder/wandb_id`, goes on for that long.

    Where there is no id, a new run is made for the folder.

    Args:
        project: on the server.
        folder: of the run.
        report: `report.json`.
        chapters: of the page.
        suffix: of the files' names.
    """
    if not (folder / "wandb_id").is_file():
        print(f"'{folder}' was not tracked in Weights & Biases; it becomes a run of its own there", file=sys.stderr)
    logger = wandb_logger(project, folder, {})
    done = publish(logger, folder, report, chapters, suffix)
    logger.finalize("success")
    return done


def _publish(run: Any, files: Sequence[Path], report: Mapping[str, Any], chapters: Sequence[Chapter]) -> None:
    import wandb  # not above: it takes a second, and most runs are not tracked

    run.summary.update(dict(scalars(report["sections"])))
    shown: dict[str, Any] = {"report/page": wandb.Html(files[0].read_text(encoding="utf-8"), inject=False)}
    for chapter in chapters:
        shown |= _shown(chapter)
    run.log(shown)
    artifact = wandb.Artifact(f"report-{run.id}", type="report")
    for file in files:
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    upload(run, artifact)


def scalars(sections: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a report by `report/CHAPTER/FIGURE`, at most `SCALARS`, lists and what is no figure left out."""
    found = (pair for name, figures in sections.items() for pair in _numbers(figures, f"report/{name}"))
    for _, pair in zip(range(SCALARS), found, strict=False):
        yield pair


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        interval = {"value", "low", "high"} <= set(value)
        for key, item in value.items():
            if key not in LEFT_OUT:
                yield from _numbers(item, (path if key == "value" else f"{path}_{key}") if interval else f"{path}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield path, float(value)


def _shown(chapter: Chapter) -> dict[str, Any]:
    """Tables and pictures by their keys; numbered, for they have no names."""
    import wandb

    grids = [block for block in chapter.blocks if isinstance(block, Grid)]
    pictures = [block for block in chapter.blocks if isinstance(block, Picture)]
    found: dict[str, Any] = {}
    for number, grid in enumerate(grids, start=1):
        head: list[str | int] = [text or f"column {i}" for i, text in enumerate(grid.head, start=1)]
        found[f"report/{chapter.name}/table_{number}"] = wandb.Table(columns=head, data=[list(row) for row in grid.rows])
    for number, picture in enumerate(pictures, start=1):
        drawn = picture.figure if isinstance(picture.figure, Sequence) else [picture.figure]
        found[f"report/{chapter.name}/picture_{number}"] = [wandb.Image(png(figure), caption=picture.caption) for figure in drawn]
    return found


def png(figure: Figure) -> Image.Image:
    """Draw a figure on white."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=110, facecolor="white")
    drawn.seek(0)
    return Image.open(drawn)
