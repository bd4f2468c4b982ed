"""A DeepSpeed checkpoint for another number of ranks, through DeepSpeed's universal checkpoints."""

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAG = "checkpoint"  # the folder that Lightning has DeepSpeed write into


def convert(path: Path, target: Path) -> None:
    """Write the universal form of a checkpoint: every parameter's weights and moments whole, in a file of its own.

    Args:
        path: a checkpoint of ZeRO-1, 2 or 3.
        target: a new folder.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(target, ignore_errors=True)
    (target / TAG).mkdir(parents=True)
    # `inject_missing_state`: of models without tensor parallelism there is nothing to say about it, but ZeRO-1 and 2 must say so
    options = Namespace(
        input_folder=str(path / TAG),
        output_folder=str(target / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and a diary
        try:
            main(options)
        except BaseException:
            remove(target)  # it may be what has filled the disk
            raise


@contextmanager
def reads_universal(engine: Any, target: Path) -> Iterator[None]:
    """Have an engine read a universal checkpoint as long as the context is open, and mend what it read.

    Private, for the engine's config is that of the whole run.
    """
    engine._config.load_universal_checkpoint = True
    try:
        yield
        _mend(engine.optimizer.optimizer, target)
    finally:
        engine._config.load_universal_checkpoint = False


def _mend(optimizer: torch.optim.Optimizer, target: Path) -> None:
    # Stage 3 gives every group of parameters the hyperparameters of the first, e.g. its weight decay, and all of them one tensor for the
    # number of steps, which then counts each step once a group
    saved = torch.load(target / TAG / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)["param_groups"]
    for group, right in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in right.items() if key != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def remove(target: Path) -> None:
    """Delete the universal form."""
    shutil.rmtree(target, ignore_errors=True)


def weights(path: Path) -> dict[str, Tensor]:
    """Give the state dict of a checkpoint, whole and in float32, whatever the stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG)


def client_state(path: Path) -> dict[str, Any]:
    """Give what is in a checkpoint beside the tensors."""
    first = min((path / TAG).glob("*_model_states.pt"))
    return torch.load(first, map_location="cpu", weights_only=False)  # of our own run, and verified; it holds plain objects of Lightning
