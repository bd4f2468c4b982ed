"""What `distill export` has left of a run, as models that can be looked at."""

from functools import partial
from pathlib import Path

from torch import nn

from distill.export.base import Run
from distill.export.driver import all_formats
from distill.report.evidence import Subject
from distill.tasks import Task
from distill.types import Batch, Outputs


def exports_in(folder: Path) -> dict[str, tuple[str, str]]:
    """The exports in a folder, by the names of theirs: format and precision."""
    found = (export.name.rpartition("-") for export in sorted(folder.glob("*-*")) if export.is_dir())
    return {f"{name}-{precision}": (name, precision) for name, _, precision in found if name in all_formats()}


def exported(folder: Path, task: Task, absent: dict[str, str]) -> dict[str, Subject]:
    """Load the exports of a run, each with the runtime that it is for, on the CPU.

    Args:
        folder: of the run.
        task: what they are for.
        absent: is told of those that cannot be loaded, and why: their files are damaged, or what runs them is not installed.
    """
    formats, home, found = all_formats(), folder / "export", {}
    for place, (name, precision) in exports_in(home).items():
        try:
            run = formats[name](precision).load(home / place, task)
        except Exception as error:  # of any runtime's own kind
            absent[place] = f"it cannot be loaded: {' '.join(str(error).split())[:200] or type(error).__name__}"
        else:
            found[place] = Subject(partial(_outputs, run), None, home / place)
    return found


def _outputs(run: Run, batch: Batch) -> Outputs:
    logits = run({name: value.cpu() for name, value in batch.items()})
    return Outputs(logits if logits.ndim == 3 else logits[:, None], nn.Identity())
