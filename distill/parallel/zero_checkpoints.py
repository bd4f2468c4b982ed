"""The checkpoints of DeepSpeed's engine as folders of ours: published whole, and read by other ranks and other stages too."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerFn

from distill import checkpoints
from distill.parallel import folder, universal
from distill.types import ConfigError


class ZeroCheckpoints(DeepSpeedStrategy):
    """Saves and loads; the rest is Lightning's."""

    @property
    def kind(self) -> str:
        """What a checkpoint is of, e.g. `ZeRO-2`."""
        assert isinstance(self.config, dict)
        return f"ZeRO-{self.config.get('zero_optimization', {}).get('stage', 0)}"

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Give nothing: the engine saves it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder beside the target, every rank its part, and publish it.

        Raises:
            TrainingError: the disk refuses on any rank.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}; leave it out")
        frozen = self._frozen() if self.exclude_frozen_parameters else set()
        names = [name for name in checkpoint["state_dict"] if name not in frozen]
        rest = {k: v for k, v in checkpoint.items() if k != "optimizer_states"} | {"state_dict": folder.names_only(names)}
        target = Path(self.broadcast(filepath))
        parts = folder.Parts(self.kind, self.world_size, names)
        with folder.published(self, target, parts) as here, _errors_after(self.deepspeed_engine):
            self.deepspeed_engine.save_checkpoint(
                str(here), client_state=rest, tag=universal.TAG, exclude_frozen_parameters=self.exclude_frozen_parameters
            )

    def _frozen(self) -> set[str]:
        assert self.lightning_module is not None
        return {name for name, parameter in self.lightning_module.named_parameters() if not parameter.requires_grad}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder; where other ranks or another stage wrote it, convert it first.

        Raises:
            ConfigError: it is damaged, or of another student.
        """
        assert self.lightning_module is not None
        path, parts = folder.opened(self, checkpoint_path)
        wanted = self.lightning_module.state_dict().keys()
        folder.check_names(path, parts.names, wanted, self._frozen() if self.exclude_frozen_parameters else ())
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return self._load_weights(path)
        same = (parts.kind, parts.world_size) == (self.kind, self.world_size)
        with nullcontext(path) if same else self._converted(path) as here:
            _, client_state = self.deepspeed_engine.load_checkpoint(
                str(here), tag=universal.TAG, load_lr_scheduler_states=False, load_module_strict=not self.exclude_frozen_parameters
            )
        assert client_state is not None, "verified, so it is there"
        return client_state

    @contextmanager
    def _converted(self, path: Path) -> Iterator[Path]:
        beside = checkpoints.beside(path.with_name(f"{path.name}.universal"))
        marker = checkpoints.beside(path.with_name(f"{path.name}.converting"))
        what = f"cannot convert the checkpoint '{path}' for {self.world_size} ranks of {self.kind}"
        folder.alone(self, marker, partial(universal.convert, path, beside), what, ConfigError)
        try:
            with universal.reads_universal(self.deepspeed_engine, beside):
                yield beside
        finally:
            self.barrier()
            if self.is_global_zero:
                universal.remove(beside)

    def _load_weights(self, path: Path) -> dict[str, Any]:
        assert self.lightning_module is not None
        weights = universal.weights(path)
        self.lightning_module.load_state_dict(weights, strict=False)  # the names were compared
        return universal.client_state(path)


@contextmanager
def _errors_after(engine: Any) -> Iterator[None]:
    """Raise what a write of a checkpoint raises only when the engine is done: it ends with a barrier, where the other ranks wait."""
    errors: list[Exception] = []
    save = engine.checkpoint_engine.save

    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return save(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    engine.checkpoint_engine.save = noting
    try:
        yield
    finally:
        engine.checkpoint_engine.save = save
    if errors:
        raise errors[0]
