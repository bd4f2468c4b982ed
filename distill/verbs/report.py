"""`report`: what the student of a run kept, lost and costs, and how sure that is; or several runs side by side."""

import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from distill import folders
from distill.command import REPORT_ROWS, Parser
from distill.export.subjects import exported
from distill.module import DistillModule
from distill.report import whole
from distill.report.gather import Models, evidence, held_out, name_of
from distill.report.runs import compare
from distill.report.student import trained
from distill.types import ConfigError
from distill.verb import WithModels

HELP = """\
report: what the student of a run kept, lost and costs, and how sure that is.

  python train.py report runs/NAME                        report.html and report.json anew, e.g. after an export
  python train.py report runs/NAME --ckpt_path last       of a checkpoint: report-step-N.html
  python train.py report runs/A runs/B --out FILE         runs side by side (default: comparison.html)

  --report_rows 512        held-out rows that are looked at
  --tasks [arc_easy]       benchmarks of lm-evaluation-harness, or a folder of them
  --task_limit 100         questions of each
  --logger wandb           show it in the run at Weights & Biases as well

In place of a folder a configuration: --config runs/NAME/config.yaml. Any other key of it can be given too, see fit --help; of data that
have moved, for instance, --data.val_data=FILE.
"""


class Report:
    """Looks at one run, or at several, given as folders; one may be given as its configuration."""

    def __init__(self) -> None:
        args = sys.argv[2:]
        named = list(takewhile(lambda arg: not arg.startswith("-"), args))
        if {"-h", "--help"} & set(args):
            print(HELP, end="")
        elif not args:
            raise ConfigError("report: which run? Give its folder: report runs/NAME")
        elif len(named) > 1 or any(arg.partition("=")[0] == "--out" for arg in args):
            side_by_side(args)
        else:
            sys.argv[2:] = [*(of_folder(Path(named[0])) if named else []), *args[len(named) :]]
            OfOne()


def of_folder(folder: Path) -> list[str]:
    """The options that mean the run in a folder, wherever it has been moved to.

    Raises:
        ConfigError: there is none in it.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"report: there is no run in '{folder}', for there is no '{config}'; give the folder of one, e.g. runs/NAME")
    place = folder if folder.name not in ("", "..") else folder.resolve()
    return ["--config", str(config), f"--runs={place.parent}", f"--name={place.name}"]


def side_by_side(args: list[str]) -> None:
    """Compare runs: `RUN_A RUN_B … [--out FILE]`."""
    parser = Parser(prog="train.py report", default_env=False)
    parser.add_argument("folders", type=Path, nargs="+", help="of runs, e.g. runs/a runs/b; the first is what the others are compared with")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page")
    given = parser.parse_args(args)
    print(f"The comparison is {compare.write(given.folders, given.out)}")


class OfOne(WithModels):
    """Measures a finished run, or one of its checkpoints, and writes `report.html` and `report.json`."""

    accelerator = "auto"

    def before_instantiate_classes(self) -> None:
        """Find the run, and the checkpoint, where one is named."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        self.folder = Path(config.runs) / (config.name or "")
        if config.name is None:
            raise ConfigError("report: which run? Give its folder: report runs/NAME")
        if not self.folder.is_dir():
            raise ConfigError(f"report: there is no run in '{self.folder}'; train it first, or give its folder: report runs/NAME")
        path = folders.checkpoint(self.folder, config.ckpt_path)
        self.checkpoint = Path(path) if path else None
        if self.checkpoint and not self.checkpoint.resolve().is_relative_to(self.folder.resolve()):
            raise ConfigError(f"report: the checkpoint '{path}' is of another run than '{self.folder}'; give the folder of that run")

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Load, measure, write."""
        self.ready(module, data)
        models = Models(module, self.folder, self.trainer.strategy.root_device)
        student, suffix = name_of(module), ""
        if self.checkpoint:
            student, suffix = f"student at {self.checkpoint.stem}", f"-{self.checkpoint.stem}"
            models.add_all(student, trained(module, self.checkpoint))
        else:
            models.add_all(student)
        exports = {} if self.checkpoint else exported(self.folder, models.task, held_out(data, 1)[0], models.absent)
        asked = {key: value for key in ("tasks", "task_limit") if (value := config.get(key)) is not None}
        found = evidence(models, student, config.report_rows or REPORT_ROWS, exports, asked)
        print(f"The report is {whole.write(found, suffix, config.wandb_project if config.logger == 'wandb' else None)}")
