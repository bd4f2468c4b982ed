"""The command behind the command line: LightningCLI, with one folder a run, a baseline, and a teacher's recipe that runs first."""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from distill import checkpoints, cluster, ending, folders, slurm
from distill.callbacks.checkpoint import Checkpoints
from distill.callbacks.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO
from distill.callbacks.memory import OutOfMemory, is_out_of_memory
from distill.callbacks.memory import explain as out_of_memory
from distill.callbacks.metrics import JsonlLogger, Throughput
from distill.callbacks.preemption import Preemption
from distill.callbacks.progress import progress_callback
from distill.callbacks.watchdog import Watchdog
from distill.compress.base import Compression
from distill.data.base import DistillData
from distill.lookup import find_config
from distill.module import DistillModule
from distill.report.run import Run
from distill.report.sources.dry_run import DryRun, memory
from distill.types import ConfigError, DistillError, TrainingError
from distill.usage import explain, place

REPORT_ROWS = 512  # enough for intervals of a few points, in well under a minute on a laptop


def run(args: list[str], command: "Callable[[], Command] | None" = None) -> None:
    """Run one verb in this process, e.g. `["fit", "--config", "x.yaml"]`.

    Args:
        args: the verb and its options.
        command: makes what runs it, and with that runs it; None for the verbs of Lightning. All parse as `fit` does.
    """
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the banner says what its tips and device lists would
    # Lightning on torch's internals, and on callbacks of fit that validate does without: nothing a person can do about either
    for message in (".*LeafSpec.*", ".*callbacks used to create the checkpoint.*"):
        warnings.filterwarnings("ignore", message=message)
    # transformers imports DeepSpeed to save a model, if it is there, and DeepSpeed says which accelerator it would use
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    before = sys.argv
    # LightningCLI reads it, and Lightning's launcher starts the other ranks with it
    sys.argv = [before[0], *(["fit", *args[1:]] if command else args)]
    try:
        (command or Command)()
    except DistillError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory(error)) from error
    except (ValueError, MisconfigurationException) as error:
        if not _raised_by_lightning(error):
            raise
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    finally:
        sys.argv = before


def _raised_by_lightning(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(f"/{package}/" in frames[-1].filename for package in ("pytorch_lightning", "lightning_fabric"))


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
        parser.add_argument("--wandb_artifact", type=bool, default=False, help="upload the student there at the end")
        parser.add_argument("--baseline", type=bool, default=False, help="also train the same student alone, for the table")
        parser.add_argument("--alone", type=bool, default=False, help="train the student without its teacher, on its hard losses")
        parser.add_argument("--dry_run", type=bool, default=False, help="check everything, train nothing")
        parser.add_argument(
            "--report_rows",
            type=NonNegativeInt,
            default=REPORT_ROWS,
            help="held-out rows that the report at the end looks at; 0: no report",
        )
        parser.add_argument(
            "--tasks",
            type=list[str] | str | None,
            default=None,
            help="benchmarks of lm-evaluation-harness, or a folder of them, for the report",
        )
        parser.add_argument("--task_limit", type=PositiveInt | None, default=None, help="questions of each")
        parser.add_argument("--save_every", type=int, default=100, help="optimizer steps between checkpoints")
        parser.add_argument("--keep", type=int, default=2, help="how many of the newest checkpoints stay")
        parser.add_argument("--save_async", type=bool, default=False, help="write checkpoints while training goes on")
        parser.add_argument(
            "--watchdog_s", type=float, default=40.0, help="a rank silent for so many seconds ends the job; 0: it is waited for"
        )
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint alone: Lightning would read all of it for settings, which ours do not have, and fail on one that is none."""

    def before_instantiate_classes(self) -> None:
        """Name the run, and find the checkpoint that `last` means."""
        config = self.config[self.subcommand]
        config.name = config.name or folders.default_name(config)
        self.folder = Path(config.runs) / config.name
        again = self.subcommand == "fit" and slurm.restarts() > 0 and self.folder.exists()  # the same command line, once more
        if again and checkpoints.published(self.folder / "checkpoints"):  # else it was stopped before its first, and starts anew
            config.ckpt_path = "last"
        config.ckpt_path = folders.checkpoint(self.folder, config.ckpt_path)
        # from another run's checkpoint a new run begins; only its own is the same run going on
        self.resume = again or (bool(config.ckpt_path) and Path(config.ckpt_path).resolve().is_relative_to(self.folder.resolve()))
        if self.subcommand == "fit" and not self.resume and self.folder.exists():
            raise ConfigError(f"the run folder {self.folder} exists; take another --name, or resume with --ckpt_path last")
        if self.subcommand != "fit" and config.dry_run:
            raise ConfigError(f"--dry-run is for fit; {self.subcommand} trains nothing anyway")
        if self.subcommand != "fit" and not config.ckpt_path and self.folder.exists():
            raise ConfigError(f"{self.folder} has a trained student; say --ckpt_path last to {self.subcommand} it")

    def instantiate_classes(self) -> None:
        """Make the objects; a constructor's complaint is a mistake in the config."""
        try:
            super().instantiate_classes()
        except DistillError as error:
            raise type(error)(f"{place(error, self.config[self.subcommand])}{error}") from error
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
            trainer["logger"] = [*_as_list(trainer.get("logger")), JsonlLogger(self.folder)]
        elif self.subcommand == "fit":
            compressions = [callback for callback in _as_list(trainer.get("callbacks")) if isinstance(callback, Compression)]
            trainer |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer |= {
                "callbacks": [*compressions, DryRun(), OutOfMemory(memory), Preemption(self.folder)],
                "limit_val_batches": 0,
                "min_steps": None,
                "min_epochs": None,
            }
        trainer["plugins"] = [*_as_list(trainer.get("plugins")), AsyncCheckpointIO() if config.save_async else AtomicCheckpointIO()]
        return self.trainer_class(**cluster.settle(trainer))

    def _text(self) -> str:
        """The resolved configuration, as YAML."""
        return self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False, skip_link_targets=True)

    def _callbacks(self, config: Any) -> list[pl.Callback]:
        alone = self._alone(config) if config.baseline else None
        callbacks: list[pl.Callback] = [
            *([Watchdog(config.watchdog_s)] if config.watchdog_s else []),
            OutOfMemory(memory),
            Run(
                self.folder,
                self._text(),
                self.resume,
                alone,
                config.wandb_project if config.logger == "wandb" else None,
                config.wandb_artifact,
            ),
            Throughput(),
        ]
        if config.trainer.enable_checkpointing is not False:
            callbacks.append(Checkpoints(self.folder / "checkpoints", config.save_every, config.keep))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(progress_callback())
        return [*callbacks, Preemption(self.folder)]

    @staticmethod
    def _alone(config: Any) -> Path:
        return Path(config.runs) / f"{config.name}-alone"

    def before_fit(self) -> None:
        """Run what must come first: the dry run, the teacher's recipe, the baseline."""
        config = self.config_init[self.subcommand]
        if 0 in (self.trainer.max_steps, self.trainer.max_epochs, self.trainer.limit_train_batches):
            raise ConfigError("nothing to train: trainer.max_steps, max_epochs and limit_train_batches must not be 0")
        recipe = self.model.teacher.recipe_needed() if self.model.teacher is not None else None
        path = recipe_file(recipe) if recipe else None
        if config.dry_run:
            if path:
                print(f"The teacher {self.model.teacher.name} does not exist yet; {path} would make it first. Checked without it:")
                self.model.forget_teacher()
            return
        while recipe:  # several teachers may each have one
            self._make_teacher(recipe)
            recipe = self.model.teacher.recipe_needed()
        if config.baseline:
            self._train_alone(self._alone(config))
        pl.seed_everything(config.seed_everything, workers=True, verbose=False)

    def after_fit(self) -> None:
        """Write the report, on one rank: the others have ended, or end."""
        config = self.config_init[self.subcommand]
        nothing_held_out = self.datamodule.val_set is None or not self.trainer.limit_val_batches
        if config.dry_run or not config.report_rows or nothing_held_out or not self.trainer.is_global_zero:
            return
        wandb = config.wandb_project if config.logger == "wandb" else None
        ending.report(self.trainer, self.model, self.folder, config.report_rows, wandb)

    def _make_teacher(self, recipe: str) -> None:
        teacher, path = self.model.teacher, recipe_file(recipe)
        self._refuse_ranks(f"the teacher {teacher.name} does not exist yet; make it first with `python train.py --config {path}`")
        folder = folders.of_recipe(path)
        with folders.locked(folder):  # two runs that start together make one teacher
            if teacher.recipe_needed() == recipe:
                print(f"The teacher {teacher.name} does not exist yet: training it first, once, with {path}", flush=True)
                run(["fit", "--config", path, *folders.resume_or_start(folder)])
        if teacher.recipe_needed() == recipe:
            raise ConfigError(f"the recipe {path} ran, but left no folder {teacher.name}; its `name` must match model.teacher.model")

    def _train_alone(self, folder: Path) -> None:
        if (folder / "student").is_dir():
            folders.check_same(folder, self._text())
            return
        self._refuse_ranks("baseline: true runs in one process; run it first, on one device, with --alone true")
        print(f"Baseline: the same student alone, same initialisation, data order and steps, in {folder}", flush=True)
        overrides = ["--alone=true", "--baseline=false", "--logger=jsonl", "--report_rows=0", f"--name={folder.name}"]
        run([*sys.argv[1:], *overrides, *(folders.resume_or_start(folder) or ["--ckpt_path=null"])])

    def _refuse_ranks(self, message: str) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError(message)


def recipe_file(name: str) -> str:
    """Find the config that makes a teacher."""
    try:
        return find_config(name)
    except FileNotFoundError as error:
        raise ConfigError(f"model.teacher.recipe: {error}") from None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or isinstance(value, bool) else [value]
