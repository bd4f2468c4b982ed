"""What `distill export` has left of a run, as models that can be looked at."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from distill.export import record
from distill.export.base import Run
from distill.export.driver import all_formats
from distill.report.evidence import Subject
from distill.tasks import Task
from distill.types import Batch, Outputs

HOME = "export"


@dataclass(frozen=True)
class Loaded:
    """An export that can be run.

    Attributes:
        format: its name.
        files: its folder.
        run: from a batch to logits, on the CPU.
    """

    format: str
    files: Path
    run: Run


def home_of(run: Path, scheme: str | None = None, group_size: int | str | None = None) -> Path:
    """Where exports of a run go: `export`, or a folder of its own for each way to quantise after training, e.g. `export-ptq-int4-32`."""
    return run / "-".join([HOME, *([] if scheme is None else ["ptq", scheme]), *([] if group_size is None else [str(group_size)])])


def exports_in(run: Path, absent: dict[str, str]) -> dict[str, tuple[Path, str, str]]:
    """Find the exports of a run.

    Args:
        run: its folder.
        absent: is told of folders among them that are no exports.

    Returns:
        Folder, format and precision of each, by name: `onnx-int8-static`, or `ptq-int3: hf-fp32` of one that was quantised after training.
    """
    found = {}
    for home in (run / HOME, *sorted(run.glob(f"{HOME}-ptq-*"))):
        before = home.name.removeprefix(HOME).removeprefix("-")
        for place in (each for each in sorted(home.glob("[!.]*")) if each.is_dir()):
            kind, _, precision = place.name.partition("-")  # a precision may hold a hyphen, a format does not
            if kind in all_formats() and precision:
                found[f"{before}: {place.name}" if before else place.name] = place, kind, precision
            else:
                formats = ", ".join(sorted(all_formats()))
                absent[f"{home.name}/{place.name}"] = f"it is no export: its name is not FORMAT-PRECISION with a FORMAT of {formats}"
    return found


def loaded(folder: Path, task: Task, probe: Batch, absent: dict[str, str]) -> dict[str, Loaded]:
    """Load the exports of a run's present student, each with the runtime that it is for, on the CPU.

    Args:
        folder: of the run.
        task: what they are for.
        probe: a row that each is asked, for some load that do not run.
        absent: is told of those that are not given, and why: their files are damaged, what runs them is not installed, they are of
            another student.
    """
    student, found = record.sha256_of(folder / "student"), {}
    for name, (place, kind, precision) in exports_in(folder, absent).items():
        doing = "loaded"
        try:
            if record.is_of(place, student):
                run, doing = all_formats()[kind](precision).load(place, task), "run"
                run(probe)
                found[name] = Loaded(kind, place, run)
            else:
                absent[name] = f"it is of another student than {folder / 'student'}; export again"
        except Exception as error:  # of any runtime's own kind
            absent[name] = f"it cannot be {doing}: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return found


def exported(folder: Path, task: Task, probe: Batch, absent: dict[str, str]) -> dict[str, Subject]:
    """Give the exports of a run to its report; see `loaded`."""
    found = loaded(folder, task, {name: value.cpu() for name, value in probe.items()}, absent)
    return {
        name: Subject(partial(_outputs, each.run), None, each.files, all_formats()[each.format].runtime) for name, each in found.items()
    }


def _outputs(run: Run, batch: Batch) -> Outputs:
    logits = run({name: value.cpu() for name, value in batch.items()})
    return Outputs(logits if logits.ndim == 3 else logits[:, None], nn.Identity())
