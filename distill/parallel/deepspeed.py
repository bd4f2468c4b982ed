"""DeepSpeed's ZeRO through Lightning, with what both leave wrong mended."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from packaging.version import Version
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from distill import checkpoints
from distill.parallel import folder, universal
from distill.parallel.config import read_config
from distill.parallel.gradients import KeepsGradients
from distill.types import ConfigError

# The first release with two corrections of what ZeRO-1 and 2 with an offloaded optimizer lost of the gradient under accumulation:
# https://github.com/deepspeedai/DeepSpeed/pull/7967 and https://github.com/deepspeedai/DeepSpeed/pull/7981
FLOOR = "0.19.8"


def check_installed() -> None:
    """Make sure that there is a DeepSpeed that computes the right gradient.

    Raises:
        ConfigError: there is none, or an older one.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(f"trainer.strategy needs DeepSpeed, which is not installed: pip install 'deepspeed>={FLOOR}'") from None
    if Version(found) < Version(FLOOR):
        raise ConfigError(
            f"trainer.strategy needs DeepSpeed {FLOOR} or newer, found {found}, which loses gradients that are accumulated for an "
            f"offloaded optimizer: pip install 'deepspeed>={FLOOR}'"
        )


def without_shm() -> None:
    """Have DeepSpeed do without shared memory between CPU ranks: it would be compiled at the first start, which takes minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cut_up(model: nn.Module, config: Any) -> None:
    """Leave every rank its part of each weight, one weight at a time, from where they are.

    `deepspeed.initialize` alone would first move the whole model to the device, which may have no room for it.

    Args:
        model: whole and the same on every rank.
        config: DeepSpeed's, of stage 3.
    """
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=config)


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


class _Mended(DeepSpeedStrategy, KeepsGradients):
    """What `DeepSpeed` and `DeepSpeedCPU` share.

    Lightning alone decides when the optimizer steps, so that accumulation is that of every other strategy: the engine is told where the
    window ends, instead of counting micro-batches by itself, and divides the loss by nothing (Lightning has divided it).
    """

    accelerator_class: type[pl.accelerators.Accelerator]

    def __init__(self, config: str | dict[str, Any] | None = None, **kwargs: Any) -> None:
        check_installed()
        super().__init__(config=None if config is None else read_config(config), **kwargs)
        assert isinstance(self.config, dict)
        if not self.config.get("zero_optimization", {}).get("stage", 0):
            raise ConfigError("DeepSpeed has no zero_optimization.stage of 1, 2 or 3 here; without one, take trainer.strategy=ddp")
        # DeepSpeed refuses torch's optimizers where the state is offloaded, for being slower than its own, which has to be compiled
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    # ---- starting

    def setup_environment(self) -> None:
        """Check what is known only now: the accelerator, the precision, the clipping."""
        assert self.lightning_module is not None
        if not isinstance(self.accelerator, self.accelerator_class):
            raise ConfigError(self._wrong_accelerator())
        if self.lightning_module.trainer.gradient_clip_algorithm == "value":
            raise ConfigError("trainer.gradient_clip_algorithm is value, but DeepSpeed clips by the global norm alone; leave it out")
        self._set_up_environment()

    def _set_up_environment(self) -> None:
        super().setup_environment()

    def _wrong_accelerator(self) -> str:
        raise NotImplementedError

    def _init_deepspeed_distributed(self) -> None:
        super()._init_deepspeed_distributed()
        from deepspeed.comm import comm

        # Private, for there is no other way: the groups that DeepSpeed makes beside the world ignore the world's time-out
        # (TorchBackend.new_group takes none), and a stopped rank is waited for half an hour
        comm.cdb.new_group = partial(torch.distributed.new_group, timeout=self._timeout)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build the student whole on every rank; the engine partitions it.

        Under Lightning's `deepspeed.zero.Init` each weight is cut up as soon as it exists, so that random initialisation and
        `from_pretrained` write into stubs and training starts from other weights, silently.
        """
        yield

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        # without an engine: a student fits where it was trained, and Lightning's cannot load what stage 3 has saved
        low = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(self.precision_plugin.precision).partition("-")[0])
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.root_device, low)
        self.model = model.to(self.root_device)

    # ---- stepping

    @property
    def handles_gradient_accumulation(self) -> bool:
        """No: Lightning counts."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let the engine know that more micro-batches of this step follow."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Go backwards without the engine's division by the accumulation: Lightning has done it."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def gradient_norm(self) -> float:
        """The norm of the gradient of the last step, before clipping; inf where it was not finite and the step was skipped."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return float("inf") if norm is None or not self.deepspeed_engine.was_step_applied() else float(norm)

    # ---- checkpoints

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
        with folder.together(self, f"cannot convert the checkpoint '{path}' for {self.world_size} ranks of {self.kind}", ConfigError):
            if self.is_global_zero:
                universal.convert(path, beside)
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


class DeepSpeed(_Mended):
    """ZeRO on GPUs.

    Args:
        config: a DeepSpeed JSON file or its content; what the trainer sets (precision, clipping, accumulation) must not be in it.
        **kwargs: those of Lightning's `DeepSpeedStrategy`, e.g. `stage`, `offload_optimizer`; ignored where `config` is given.

    Raises:
        ConfigError: no DeepSpeed, a wrong config, no GPU.
    """

    accelerator_class = CUDAAccelerator

    def _wrong_accelerator(self) -> str:
        return (
            f"trainer.accelerator is {type(self.accelerator).__name__}, but DeepSpeed was started for GPUs; take trainer.accelerator=cuda, "
            "or set DS_ACCELERATOR=cpu in the environment and take trainer.strategy=zero2 or the class DeepSpeedCPU"
        )


class DeepSpeedCPU(_Mended):
    """ZeRO on CPUs, over gloo: for tests, and clusters without GPUs.

    Args:
        config: as of `DeepSpeed`.
        **kwargs: as of `DeepSpeed`.

    Raises:
        ConfigError: no DeepSpeed, a wrong config, another accelerator, a precision that CPUs do not have.
    """

    accelerator_class = CPUAccelerator

    def _wrong_accelerator(self) -> str:
        return f"trainer.accelerator is {type(self.accelerator).__name__}, but DeepSpeedCPU runs on trainer.accelerator=cpu alone"

    def _set_up_environment(self) -> None:
        if str(self.precision_plugin.precision).startswith("16"):
            raise ConfigError(f"trainer.precision is {self.precision_plugin.precision}, which CPUs do not have; take bf16-mixed or 32-true")
        without_shm()
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]  # an index each, which it asks for
        super(DeepSpeedStrategy, self).setup_environment()  # past its check for CUDA
