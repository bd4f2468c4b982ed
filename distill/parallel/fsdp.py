"""PyTorch's FSDP2 through Lightning's ModelParallelStrategy: parameters, gradients and optimizer state in shards."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distill.parallel import folder
from distill.parallel.same import check_same
from distill.types import ConfigError

KIND = "FSDP2"
REST = "meta.pt"  # the file of Lightning's for all that is no tensor of the module or its optimizer


class FSDP2(ModelParallelStrategy):
    """Shards every transformer block of the module by itself, and all the rest (embedding, head, losses' own weights) as one.

    A block is gathered while it runs, the rest from the beginning of a step to the end of its backward pass: so a head is gathered once,
    however many chunks it is applied to.

    Args:
        **kwargs: those of Lightning's `ModelParallelStrategy`, e.g. `timeout`.

    Raises:
        ConfigError: ranks hold different weights at the start.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def setup_environment(self) -> None:
        """Take all ranks for one group of data parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard, then let Lightning make the optimizer on the shards."""
        assert self.model is not None
        check_same(self.model, "model.student", self.root_device)  # nothing is broadcast
        mesh = self.device_mesh["data_parallel"]
        low = {"bf16-mixed": torch.bfloat16}.get(str(self.precision_plugin.precision))
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=None if low is None else torch.float32, cast_forward_inputs=False)
        for block in blocks(self.model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        super().setup(trainer)

    # ---- stepping: through the module itself, for FSDP gathers the rest when its `forward` is called

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's, as its `forward`."""
        with self.precision_plugin.train_step_context():
            return self._through("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's, as its `forward`."""
        with self.precision_plugin.val_step_context():
            return self._through("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's, as its `forward`."""
        with self.precision_plugin.test_step_context():
            return self._through("test_step", *args, **kwargs)

    def _through(self, name: str, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        return self._forward_redirection(self.lightning_module, self.lightning_module, name, *args, **kwargs)

    # ---- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder beside the target, every rank its part, and publish it.

        Raises:
            TrainingError: the disk refuses on any rank.
        """
        target = Path(self.broadcast(filepath))
        with folder.published(self, target, folder.Parts(KIND, self.world_size, list(checkpoint["state_dict"]))) as here:
            try:
                super().save_checkpoint(checkpoint, here, storage_options)
            except CheckpointException as error:  # a BaseException, raised on every rank
                raise OSError("; ".join(str(cause) for cause, _ in error.failures.values())) from error

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder that any number of ranks has written.

        Raises:
            ConfigError: it is damaged, of another strategy, or of another student.
        """
        assert self.model is not None
        path, parts = folder.opened(self, checkpoint_path)
        if parts.kind != KIND:
            raise ConfigError(f"the checkpoint '{path}' is of {parts.kind}, not of {KIND}; resume with the trainer.strategy that wrote it")
        folder.check_names(path, parts.names, self.model.state_dict())
        return super().load_checkpoint(path, weights_only) | {"state_dict": folder.names_only(parts.names)}


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the models of transformers inside a module: what these must not be split within."""
    names = {name for child in module.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    return [child for child in module.modules() if type(child).__name__ in names]
