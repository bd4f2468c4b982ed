"""`consolidate`: the student of a checkpoint as a plain folder of transformers, in mid-run, whatever strategy has trained it."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from distill import folders
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.compress.base import Compression
from distill.module import DistillModule
from distill.parallel import consolidated
from distill.parallel.folder import check_names
from distill.report.student import deployed, prepared, write
from distill.types import ConfigError
from distill.verb import Verb

STUDENT = "student."  # what the names of its tensors begin with in a checkpoint


class Consolidate(Verb):
    """Writes what the run's end would write to `runs/NAME/student`, in float32, from one of its checkpoints."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder to write."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help="the new folder (default: student-step-N in the run's)")

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and make sure that it is whole; of the callbacks keep those that change what the student is."""
        config = self.config[self.subcommand]
        given = config.trainer.callbacks or []
        given = given if isinstance(given, list) else [given]  # one may stand without a list
        kept = [each for each in given if issubclass(resolve_name(each.class_path), Compression)]
        super().before_instantiate_classes()
        config.trainer.callbacks = kept
        config.name = config.name or folders.default_name(config)
        folder = Path(config.runs) / config.name
        self.path = Path(str(folders.checkpoint(folder, config.ckpt_path or "last")))
        self.out = Path(config.out or folder / f"student-{self.path.stem}")
        if self.out.exists():
            raise ConfigError(f"the folder {self.out} exists; give --out another one")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make one that trains nothing: the module asks it for the data and the compressions."""
        callbacks = self.config_init[self.subcommand].trainer.callbacks
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, plugins=[LightningEnvironment()], **quiet)

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Read, build, write."""
        data.setup()
        module.trainer = self.trainer
        self.trainer.datamodule = data  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        module.task, module.expected = data.task(), data.model_config()
        student = trained(module, self.path)
        write(module, deployed(module, student), self.out)
        print(f"The student of {self.path} is in {self.out}")


def trained(module: DistillModule, path: Path) -> nn.Module:
    """Give the student of a checkpoint, in float32, as it is trained: LoRA beside its base, compressions not carried out.

    Args:
        module: that knows its task, data and compressions; these get their state as well.
        path: a checkpoint of any strategy, proven to be whole.

    Raises:
        ConfigError: it cannot be read, or is of another student.
    """
    saved = consolidated.read(path) if path.is_dir() else AtomicCheckpointIO().load_checkpoint(path)
    weights = {name.removeprefix(STUDENT): weight for name, weight in saved["state_dict"].items() if name.startswith(STUDENT)}
    student = prepared(module, torch.float32)
    frozen = {name for name, parameter in student.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    check_names(path, weights, student.state_dict(), frozen)  # exclude_frozen_parameters leaves them to their base
    try:
        student.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint '{path}' is of another student: {' '.join(str(error).split())[:300]}") from error
    for compression in module.compressions:
        if compression.state_key in saved["callbacks"]:
            compression.load_state_dict(saved["callbacks"][compression.state_key])
    return student
