"""Out of memory, said in one line: what was in use, what was estimated, and which knobs help."""

import contextlib
import os
import resource
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from distill.parallel.gradients import shards_parameters

SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of CUDA, NCCL and MPS; of the CPU; of cuBLAS
KNOBS = (
    "model.student.gradient_checkpointing=true; then a smaller model.chunk (the positions whose logits exist at once), "
    "and with several GPUs trainer.strategy zero1, zero2, zero3 or zero3_offload. `plan` with the same --config estimates each"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be had: torch has a class for it on GPUs alone."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


def explain(error: BaseException) -> str:
    """Give the line that `OutOfMemory` noted on an exception; a shorter one where it did not see it, as in `validate`."""
    notes: list[str] = getattr(error, "__notes__", [])  # of PEP 678: an exception has it from the first note on
    return notes[-1] if notes else f"out of memory. Lower data.val_batch_size or model.chunk. {_first_line(error)}"


class OutOfMemory(pl.Callback):
    """Notes on an out-of-memory exception what was in use at the peak and what to turn down, in the order of what it costs.

    The batch first: `batch_size · accumulate_grad_batches` stays, and with it the training. Then recomputing activations, then time or
    traffic. Notes are part of the traceback (`BaseException.add_note`); `explain` gives the line by itself.

    Args:
        estimate: bytes on a device by part, of a module whose parameters lie whole on it; names in brackets are not shown.
    """

    def __init__(self, estimate: Callable[[Any], Mapping[str, float]]) -> None:
        self.estimate = estimate
        self._ready = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on there is something to estimate, unless it is in shards."""
        self._ready = not shards_parameters(trainer.strategy)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the note."""
        if not is_out_of_memory(exception):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        parts: Mapping[str, float] = {}
        if self._ready:
            with contextlib.suppress(Exception):  # an estimate that fails must not take the place of the error
                parts = self.estimate(pl_module)
        exception.add_note(
            f"out of memory on {trainer.strategy.root_device} at step {trainer.global_step}: {used(trainer.strategy.root_device)}. "
            f"{_estimated(parts)}What helps, in this order: {smaller(data.batch_size, trainer.accumulate_grad_batches)}{KNOBS}. "
            f"{_first_line(exception)}"
        )


def smaller(batch_size: int, accumulate: int) -> str:
    """Say how to halve a micro-batch and keep the global batch; nothing where it has one row."""
    if batch_size == 1:
        return ""
    half = batch_size // 2 if batch_size % 2 == 0 else 1
    keys = f"data.batch_size={half} with trainer.accumulate_grad_batches={accumulate * batch_size // half}"
    return f"{keys} (now {batch_size} and {accumulate}; the global batch stays); then "


def used(device: torch.device) -> str:
    """Say what was in use at the peak, of how much there is: of a GPU by torch, of the CPU by the whole process."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{_gb(peak)} of {_gb(total)} in use at the peak"


def _estimated(parts: Mapping[str, float]) -> str:
    largest = sorted((part for part in parts.items() if part[0][0] != "("), key=lambda part: -part[1])[:5]
    return f"Estimated: {', '.join(f'{name} {_gb(size)}' for name, size in largest)}. " if parts else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _first_line(error: BaseException) -> str:
    return f"torch said: {str(error).strip().splitlines()[0]}" if str(error).strip() else ""
