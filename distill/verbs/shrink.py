"""`shrink`: the student as it is cut out of its source, before any training."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.cli import LightningArgumentParser

from distill import folders, hub
from distill.module import DistillModule
from distill.report import tables
from distill.report.student import write
from distill.students.low_rank import LowRank
from distill.students.shrink import Shrunk
from distill.types import ConfigError
from distill.verb import Verb


class Shrink(Verb):
    """Builds the student that the YAML describes, a `Shrunk` or `LowRank`, and writes it to a folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder to write."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help="the new folder (default: runs/NAME/student)")

    def before_instantiate_classes(self) -> None:
        """Name the folder, and refuse one that is there."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        config.name = config.name or folders.default_name(config)
        self.out = Path(config.out or Path(config.runs) / config.name / "student")
        if self.out.exists():
            raise ConfigError(f"the folder {self.out} exists; give --out another one")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make one that trains nothing: the module asks it for the data."""
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return pl.Trainer(accelerator="cpu", devices=1, plugins=[LightningEnvironment()], **quiet)

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Read the data, cut, write, and say how large it was and is."""
        student = module.recipe_of_student
        if not isinstance(student, Shrunk | LowRank):
            raise ConfigError(f"model.student is {type(student).__name__}, which cuts nothing; take Shrunk or LowRank")
        data.prepare_data()
        data.setup()
        module.trainer, self.trainer.datamodule = self.trainer, data  # type: ignore[attr-defined]  # the Trainer declares none
        module.task, module.expected = data.task(), data.model_config()
        model: Any = module.new_student(torch.bfloat16 if str(config.trainer.precision) == "bf16-true" else torch.float32)
        write(module, model.eval(), self.out)
        tables.show(
            tables.banner(student.name, {name: _size(size) for name, size in (("before", student.source), ("after", hub.describe(model)))})
        )
        on_disk = sum(file.stat().st_size for file in self.out.glob("*.safetensors"))
        print(f"The student is in {self.out}, {on_disk / 1e6:.1f} MB on disk")


def _size(described: dict[str, Any]) -> str:
    return f"{described['parameters']:,} parameters · {described['megabytes']:.1f} MB {described['dtype']}"
