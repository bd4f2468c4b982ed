"""`consolidate`: the student of a checkpoint as a plain folder of transformers, in mid-run, whatever strategy has trained it."""

from pathlib import Path
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser

from distill import folders
from distill.module import DistillModule
from distill.report.student import deployed, trained, write
from distill.types import ConfigError
from distill.verb import WithModels


class Consolidate(WithModels):
    """Writes what the run's end would write to `runs/NAME/student`, from one of its checkpoints."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder to write."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help="the new folder (default: student-step-N in the run's)")

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and make sure that it is whole."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        config.name = config.name or folders.default_name(config)
        folder = Path(config.runs) / config.name
        self.path = Path(str(folders.checkpoint(folder, config.ckpt_path or "last")))
        self.out = Path(config.out or folder / f"student-{self.path.stem}")
        if self.out.exists():
            raise ConfigError(f"the folder {self.out} exists; give --out another one")

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Read, build, write."""
        self.ready(module, data)
        student = trained(module, self.path)
        write(module, deployed(module, student), self.out)
        print(f"The student of {self.path} is in {self.out}")
