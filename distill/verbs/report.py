"""`report`: what the student of a run kept, lost and costs, and how sure that is; or several runs side by side."""

import sys
from pathlib import Path
from typing import Any

from distill import folders
from distill.command import REPORT_ROWS, Parser
from distill.export.subjects import exported
from distill.module import DistillModule
from distill.report import whole
from distill.report.gather import Models, evidence, name_of
from distill.report.runs import compare
from distill.report.student import trained
from distill.types import ConfigError
from distill.verb import WithModels


class Report:
    """Looks at one run, given as a configuration, or at several, given as folders."""

    def __init__(self) -> None:
        args = sys.argv[2:]
        if args and not args[0].startswith("-"):
            side_by_side(args)
        else:
            OfOne()


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
            raise ConfigError("report: which run? Give the configuration that it has left, --config runs/NAME/config.yaml, or its --name")
        if not self.folder.is_dir():
            raise ConfigError(f"report: there is no run in '{self.folder}'; train it first")
        path = folders.checkpoint(self.folder, config.ckpt_path)
        self.checkpoint = Path(path) if path else None

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
        exports = {} if self.checkpoint else exported(self.folder, models.task)
        asked = {key: value for key in ("tasks", "task_limit") if (value := config.get(key)) is not None}
        found = evidence(models, student, config.report_rows or REPORT_ROWS, exports, asked)
        print(f"The report is {whole.write(found, suffix, config.wandb_project if config.logger == 'wandb' else None)}")
