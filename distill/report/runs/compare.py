"""Several runs side by side: `distill report RUN_A RUN_B …`."""

from collections.abc import Sequence
from pathlib import Path

from distill.report.runs import sidebyside
from distill.report.files import write_text
from distill.report.runs.finished import Finished
from distill.report.page.render import Chapter, page
from distill.types import ConfigError


def write(folders: Sequence[Path], out: Path) -> Path:
    """Put two or more runs side by side on one page.

    Args:
        folders: of the runs, each with a `report.json`; the first is what the others are compared with.
        out: where the page goes.

    Returns:
        The page.

    Raises:
        ConfigError: fewer than two runs, one given twice, or one without a whole report.
    """
    if len(folders) < 2:
        raise ConfigError(f"report: two runs or more are wanted to compare, got {len(folders)}; of one run give its folder and no --out")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (there := folder.resolve()) in seen:
            raise ConfigError(f"report: '{folder}' and '{seen[there]}' are the same run; give each once")
        seen[there] = folder
    runs = [Finished.load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    text = page(
        f"{' · '.join(run.name for run in runs)}",
        f"{len(runs)} runs side by side; differences are against {runs[0].name}.",
        _chapters(runs),
        {"runs": f"{len(runs)}"},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' where two are called alike."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else f"{folder.resolve().parent.name}/{name}" for folder, name in zip(folders, last, strict=True)]


def _chapters(runs: Sequence[Finished]) -> list[Chapter]:
    return [
        Chapter("figures", "Figures", "What did each run come to?", sidebyside.headlines(runs)),
        Chapter("differences", "Differences", "Is one student really better than another?", sidebyside.tests(runs)),
        Chapter("tradeoff", "Quality and cost", "Which models does no other beat?", sidebyside.tradeoffs(runs)),
        Chapter("training", "Training", "How did the students get there?", sidebyside.curves(runs)),
        Chapter("configuration", "Configuration", "What was done differently?", sidebyside.settings(runs)),
    ]
