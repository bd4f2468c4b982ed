"""Running a method of the module where a strategy looks after its weights."""

from typing import Any

import pytorch_lightning as pl

from distill.parallel.gradients import shards_parameters


def through(trainer: pl.Trainer, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the trainer's module as the strategy calls `training_step`; every rank must call it equally often.

    Where parameters are in shards, they are gathered by the `forward` of what the strategy has wrapped, so the method is called in its
    place, as Lightning's own steps are. Elsewhere it is simply called.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    if not shards_parameters(strategy):
        return getattr(module, name)(*args, **kwargs)
    assert strategy.model is not None, "the strategy sets up first"
    return strategy._forward_redirection(strategy.model, module, name, *args, **kwargs)
