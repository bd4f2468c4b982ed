"""What a verb of ours is: it parses as `fit` does and makes the module and the data by name, but no trainer."""

import sys
from abc import ABC, abstractmethod
from pkgutil import resolve_name
from typing import Any, cast

import pytorch_lightning as pl
from jsonargparse import ArgumentParser
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.cli import LightningArgumentParser

from distill import cluster
from distill.command import Command, recipe_file
from distill.compress.base import Compression
from distill.module import DistillModule


class Verb(Command, ABC):
    """One YAML drives every verb: each reads the same configuration, adds its own keys, and does its one thing in `act`."""

    strategy: str  # `trainer.strategy`, by name
    callbacks: list[str]  # `trainer.callbacks`, by import path

    def __init__(self) -> None:
        if {"-h", "--help"} & set(sys.argv[2:]):
            print(self.help(), end="")
            raise SystemExit(0)
        super().__init__()

    @classmethod
    def help(cls) -> str:
        """What this verb does, and the keys that it adds to those of `fit`, which are hundreds."""
        common, own = _Keys(), _Keys()
        Command.add_arguments_to_parser(cast(Command, None), cast(LightningArgumentParser, common))
        cls.add_arguments_to_parser(object.__new__(cls), cast(LightningArgumentParser, own))
        prog = f"python train.py {cls.__name__.lower()}"
        epilog = "Any other key of the configuration can be given too: fit --help"
        parser = ArgumentParser(prog=prog, usage=f"{prog} --config FILE [options]", description=cls.__doc__, epilog=epilog)
        parser.add_argument("-c", "--config", help="a configuration, or runs/NAME/config.yaml of a run")
        for name in sorted(own.given.keys() - common.given.keys()):
            parser.add_argument(name, **own.given[name])
        return str(parser.format_help())

    def before_instantiate_classes(self) -> None:
        """Keep the strategy's name, and make nothing of the trainer's: its strategies and callbacks may need what is not installed here."""
        trainer = self.config[self.subcommand].trainer
        self.strategy = str(getattr(trainer.strategy, "class_path", trainer.strategy))
        given = trainer.callbacks or []
        self.callbacks = [str(callback.class_path) for callback in (given if isinstance(given, list) else [given])]
        trainer.strategy, trainer.callbacks, trainer.logger, trainer.plugins, trainer.profiler = "auto", None, None, None, None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make none."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        self.act(self.model, self.datamodule, self.config[subcommand])

    @abstractmethod
    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Do what the verb says.

        Args:
            module: as the YAML makes it; no weights are loaded.
            data: the same; nothing is read yet.
            config: the resolved configuration, with the verb's own keys.
        """


class _Keys:
    """Notes the keys that are added to a parser."""

    def __init__(self) -> None:
        self.given: dict[str, dict[str, Any]] = {}

    def add_argument(self, name: str, **kwargs: Any) -> None:
        self.given[name] = kwargs

    def link_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Nothing that a person gives."""


class WithModels(Verb):
    """Makes a run's models as `fit` does, with its compressions and a trainer that trains nothing: the module asks it for the data."""

    accelerator: str = "cpu"

    def before_instantiate_classes(self) -> None:
        """Of the callbacks keep those that change what the student is."""
        trainer = self.config[self.subcommand].trainer
        given = trainer.callbacks or []
        given = given if isinstance(given, list) else [given]  # one may stand without a list
        kept = [each for each in given if issubclass(resolve_name(each.class_path), Compression)]
        super().before_instantiate_classes()
        trainer.callbacks = kept

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make one, for one device."""
        given = self.config_init[self.subcommand].trainer
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"precision": given.precision} if self.accelerator != "cpu" else {}
        return pl.Trainer(accelerator=self.accelerator, devices=1, callbacks=given.callbacks, plugins=[LightningEnvironment()], **quiet)

    def ready(self, module: DistillModule, data: Any) -> None:
        """Read the data, and let the module know them."""
        data.setup()
        module.trainer = self.trainer
        self.trainer.datamodule = data  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        module.task, module.expected = data.task(), data.model_config()


class Check(Verb):
    """Makes the objects and does nothing with them: what can be told of a configuration on a login node.

    Args:
        nodes: of the job that it is for; None where that is not known.
        tasks: of the job on each node; None where that is not known.

    Raises:
        ConfigError: the trainer is told of other devices or nodes than the job has, or what any command says of a configuration.
    """

    def __init__(self, nodes: int | None = None, tasks: int | None = None) -> None:
        self.nodes, self.tasks = nodes, tasks
        super().__init__()

    def act(self, module: DistillModule, data: Any, config: Any) -> None:
        """Nothing to the objects: they are made, so they can be."""
        cluster.check(config.trainer.devices, config.trainer.num_nodes, self.tasks, self.nodes, "the job has", "--gpus")


def parsed(config: str) -> tuple[DistillModule, Any]:
    """Give the module and the data's settings of another configuration, e.g. the recipe that makes the teacher."""
    before = sys.argv
    sys.argv = [before[0], "fit", "--config", recipe_file(config)]
    try:
        made = Check()
    finally:
        sys.argv = before
    return made.model, made.config[made.subcommand].data.init_args
