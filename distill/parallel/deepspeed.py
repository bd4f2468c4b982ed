"""DeepSpeed's ZeRO through Lightning, with what both leave wrong mended."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from distill.parallel.config import read_config
from distill.parallel.gradients import KeepsGradients
from distill.parallel.zero import check_installed, cut_up, without_shm
from distill.parallel.zero_checkpoints import ZeroCheckpoints
from distill.types import ConfigError


class _Mended(ZeroCheckpoints, KeepsGradients):
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

    def _setup_model_and_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Private, and the last moment before the engine moves the whole model to the device
        assert isinstance(self.config, dict)
        if self.zero_stage_3:
            cut_up(model, self.config, self.root_device)
        return super()._setup_model_and_optimizer(model, *args, **kwargs)

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
