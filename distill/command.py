"""The command behind the command line: LightningCLI, with one folder a run, a baseline, and a teacher's recipe that runs first."""

import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from distill.callbacks.checkpoint import AtomicCheckpointIO
from distill.callbacks.metrics import JsonlLogger, Throughput
from distill.callbacks.progress import progress_callback
from distill.data.base import DistillData
from distill.lookup import find_config
from distill.module import DistillModule
from distill.report.dry_run import DryRun
from distill.report.run import Run
from distill.types import ConfigError, DistillError
from distill.usage import explain


def run(args: list[str]) -> None:
    """Run one verb in this process, e.g. `["fit", "--config", "x.yaml"]`."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the banner says what its tips and device lists would
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of torch's internals; nothing a person can do about it
    before = sys.argv
    sys.argv = [before[0], *args]  # LightningCLI reads it, and Lightning's launcher starts the other ranks with it
    try:
        Command()
    finally:
        sys.argv = before


class Parser(LightningArgumentParser):
    """Says a mistake in one line instead of printing the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what the command line shows."""
        raise ConfigError(explain(message, option_keys(self)))


def option_keys(parser: LightningArgumentParser) -> list[str]:
    """The keys that a parser accepts, those of its verbs included."""
    keys: list[str] = []
    for action in parser._actions:
        for verb in getattr(action, "_name_parser_map", {}).values():
            keys += option_keys(verb)
        keys += [option.lstrip("-") for option in action.option_strings if option.startswith("--")]
    return keys


class Command(LightningCLI):
    """Parses, makes the objects, runs the verb."""

    def __init__(self) -> None:
        super().__init__(
            DistillModule,
            DistillData,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=None,  # Run writes it, once everything has been looked at
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            trainer_defaults={
                "logger": False,
                "use_distributed_sampler": False,  # the loader splits by rank itself
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs that are Lightning's."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of a run that are no one class's."""
        parser.add_argument("--name", type=str | None, default=None, help="the run's folder inside `runs`")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--logger", type=Literal["jsonl", "wandb"], default="jsonl", help="wandb: also track in Weights & Biases")
        parser.add_argument("--wandb_project", type=str, default="distill", help="project for --logger wandb")
        parser.add_argument("--baseline", type=bool, default=False, help="also train the same student alone, for the table")
        parser.add_argument("--alone", type=bool, default=False, help="train the student without its teacher, on its hard losses")
        parser.add_argument("--dry_run", type=bool, default=False, help="check everything, train nothing")
        parser.add_argument("--save_every", type=int, default=100, help="optimizer steps between checkpoints")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Name the run, and find the checkpoint that `last` means."""
        config = self.config[self.subcommand]
        config.name = config.name or default_name(config)
        self.folder = Path(config.runs) / config.name
        self.resume = config.ckpt_path is not None
        if config.ckpt_path == "last":
            config.ckpt_path = str(self.folder / "checkpoints" / "last.ckpt")
        if config.ckpt_path and not Path(config.ckpt_path).is_file():
            raise ConfigError(
                f"ckpt_path: no checkpoint '{config.ckpt_path}'; give a file, or `last` with the --name of a run that has one"
            )
        if self.subcommand == "fit" and not self.resume and self.folder.exists():
            raise ConfigError(f"the run folder {self.folder} exists; take another --name, or resume with --ckpt_path last")

    def instantiate_classes(self) -> None:
        """Make the objects; a constructor's complaint is a mistake in the config."""
        try:
            super().instantiate_classes()
        except DistillError:
            raise
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ConfigError(explain(str(error), option_keys(self.parser))) from error

    def after_instantiate_classes(self) -> None:
        """Take the teacher away where the student is to train alone."""
        if self.config_init[self.subcommand].alone:
            self.model.forget_teacher()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add what every run has: its folder, checkpoints, metrics, progress."""
        config = self.config_init[self.subcommand]
        trainer = dict(config.trainer)
        if self.subcommand == "fit" and not config.dry_run:
            trainer["callbacks"] = [*_as_list(trainer.get("callbacks")), *self._callbacks(config)]
            trainer["logger"] = [*_as_list(trainer.get("logger") or None), JsonlLogger(self.folder)]
        elif self.subcommand == "fit":
            trainer |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [DryRun()]}
            trainer |= {"max_steps": 1, "limit_val_batches": 0}
        trainer["plugins"] = [*_as_list(trainer.get("plugins")), AtomicCheckpointIO()]
        return self.trainer_class(**trainer)

    def _callbacks(self, config: Any) -> list[pl.Callback]:
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False, skip_link_targets=True)
        alone = self._alone(config) if config.baseline else None
        return [
            Run(self.folder, text, resume=self.resume, alone=alone, wandb=config.wandb_project if config.logger == "wandb" else None),
            ModelCheckpoint(
                self.folder / "checkpoints",
                filename="last",
                every_n_train_steps=config.save_every,
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            ),
            Throughput(),
            progress_callback(),
        ]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; where Lightning itself refuses a setting, that is a mistake in the config."""
        try:
            super()._run_subcommand(subcommand)
        except DistillError:
            raise
        except (ValueError, MisconfigurationException) as error:
            if not _raised_by_lightning(error):
                raise
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    @staticmethod
    def _alone(config: Any) -> Path:
        return Path(config.runs) / f"{config.name}-alone"

    def before_fit(self) -> None:
        """Run what must come first: the dry run, the teacher's recipe, the baseline."""
        config = self.config_init[self.subcommand]
        if config.dry_run:
            if self.model.teacher is not None and (recipe := self.model.teacher.recipe_needed()):
                print(f"The teacher {self.model.teacher.name} does not exist yet; {recipe} would make it first. Checked without it:")
                self.model.forget_teacher()
            return
        self._make_teacher()
        if config.baseline and not (self._alone(config) / "student").is_dir():
            self._train_alone(self._alone(config))
        pl.seed_everything(config.seed_everything, workers=True, verbose=False)

    def _make_teacher(self) -> None:
        recipe = self.model.teacher.recipe_needed() if self.model.teacher is not None else None
        if recipe is None:
            return
        path = find_config(recipe)
        self._refuse_ranks(
            f"the teacher {self.model.teacher.name} does not exist yet; make it first with `python train.py --config {recipe}`"
        )
        print(f"The teacher {self.model.teacher.name} does not exist yet: training it first, once, with {path}", flush=True)
        run(["fit", "--config", path, *_resume_or_start(path)])
        if self.model.teacher.recipe_needed():
            raise ConfigError(
                f"the recipe {path} ran, but left no folder {self.model.teacher.name}; its `name` must match model.teacher.model"
            )

    def _train_alone(self, folder: Path) -> None:
        self._refuse_ranks("baseline: true runs in one process; run it first, on one device, with --alone true")
        print(f"Baseline: the same student alone, same initialisation, data order and steps, in {folder}", flush=True)
        run([*sys.argv[1:], "--alone=true", "--baseline=false", "--logger=jsonl", "--ckpt_path=null", f"--name={folder.name}"])

    def _refuse_ranks(self, message: str) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError(message)


def default_name(config: Any) -> str:
    """Name a run after its config and the time; the same on every rank, and after a requeue, where a launcher gives an id."""
    stem = Path(str(config.config[0])).stem if config.get("config") else "run"
    launched = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    if launched in (None, "none"):
        launched = os.environ.setdefault("DISTILL_STARTED", time.strftime("%Y%m%d-%H%M%S"))
    return f"{stem}-{launched}"


def _resume_or_start(path: str) -> list[str]:
    """Go on with a recipe that was interrupted; one that never saved a checkpoint is moved aside."""
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    folder = Path(config.get("runs", "runs")) / str(config.get("name"))
    if (folder / "checkpoints" / "last.ckpt").is_file():
        return ["--ckpt_path", "last"]
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.interrupted-{time.strftime('%Y%m%d-%H%M%S')}"))
    return []


def _raised_by_lightning(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(f"/{package}/" in frames[-1].filename for package in ("pytorch_lightning", "lightning_fabric"))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
