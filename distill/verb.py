"""What a verb of ours is: it parses as `fit` does and makes the module and the data by name, but no trainer."""

import sys
from abc import ABC, abstractmethod
from typing import Any

from distill import cluster
from distill.command import Command, recipe_file
from distill.module import DistillModule


class Verb(Command, ABC):
    """One YAML drives every verb: each reads the same configuration, adds its own keys, and does its one thing in `act`."""

    strategy: str  # `trainer.strategy`, by name
    callbacks: list[str]  # `trainer.callbacks`, by import path

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
