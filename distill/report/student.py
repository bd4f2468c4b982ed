"""What is saved of a finished run: the student that plain transformers loads, and what the terms learned themselves."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import hub
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.module import DistillModule
from distill.parallel import consolidated
from distill.parallel.folder import check_names
from distill.parallel.weights import whole_state_dict
from distill.report.files import write_file, write_folder
from distill.students.lora import merged
from distill.types import ConfigError, TrainingError

STUDENT = "student."  # what the names of its tensors begin with in a checkpoint


def save(trainer: pl.Trainer, module: DistillModule, folder: Path) -> dict[str, Any]:
    """Write `student/` and, where the terms learned something, e.g. projectors, `losses.safetensors`; every rank must call.

    Args:
        trainer: of the module; its strategy may hold the weights in parts, or the better ones in the optimizer.
        module: whose student and terms.
        folder: of the run.

    Returns:
        What was saved, see `hub.describe`; of use on rank 0.
    """
    student, losses = whole(trainer, module)
    if not trainer.is_global_zero:
        return module.size
    student = deployed(module, student)
    write(module, student, folder / "student")
    if tensors := {name: tensor.contiguous() for name, tensor in losses.items()}:
        write_file(folder / "losses.safetensors", lambda beside: save_file(tensors, beside))
    return hub.describe(student)


def deployed(module: DistillModule, student: nn.Module) -> PreTrainedModel:
    """Give the model that is served: LoRA merged, compressions carried out on what `whole` gave.

    Raises:
        TrainingError: they have left something behind, which stock transformers would load as random weights.
    """
    model = merged(student)
    for compression in module.compressions:
        model = compression.finish(model)
    left = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("parametrizations", "fake_quantised_input", "pass_by")]
    if module.compressions and left:
        raise TrainingError(
            f"the student was not saved: after all trainer.callbacks were carried out {len(left)} modules that they had added are still "
            f"there, e.g. '{left[0]}', and transformers would load random weights for them. The last checkpoint is safe: once the callback "
            "is mended, `consolidate` makes the student of it"
        )
    return model


def whole(trainer: pl.Trainer, module: DistillModule) -> tuple[nn.Module, dict[str, Tensor]]:
    """Give the student with all its weights, and the state of the terms; on rank 0, and of use there alone.

    DeepSpeed and FSDP2 leave each rank a part, or keep the float32 weights in the optimizer: there it is a new model on the CPU. So it is
    where compressions will change it, for a deep copy of a parametrized module shares its class with the original.
    """
    assert module.student is not None, "configure_model comes first"
    sharded = isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy)
    if not sharded and not module.compressions:
        return module.student, module.losses.state_dict()
    student, losses = (whole_state_dict(trainer, part) for part in (module.student, module.losses))
    if not trainer.is_global_zero:
        return module.student, {}
    another = prepared(module, torch.float32 if sharded else next(module.student.parameters()).dtype)
    another.load_state_dict(student)
    return another, losses


def prepared(module: DistillModule, dtype: torch.dtype) -> nn.Module:
    """Give a new student with what the compressions add, as `configure_model` makes it: it takes the weights of a trained one."""
    student = module.new_student(dtype)
    module.prepare_compressions(student)
    return student


def trained(module: DistillModule, path: Path) -> nn.Module:
    """Give the student of a checkpoint as it is trained: LoRA beside its base, compressions not carried out.

    Its dtype is that of `whole`: quantised, the same weights come to other integers in another.

    Args:
        module: that knows its task, data and compressions; these get their state as well.
        path: a checkpoint of any strategy, proven to be whole.

    Raises:
        ConfigError: it cannot be read, or is of another student.
    """
    saved = consolidated.read(path) if path.is_dir() else AtomicCheckpointIO().load_checkpoint(path)
    weights = {name.removeprefix(STUDENT): weight for name, weight in saved["state_dict"].items() if name.startswith(STUDENT)}
    own = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    student = prepared(module, torch.float32 if path.is_dir() else own)
    frozen = {name for name, parameter in student.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    check_names(path, weights, student.state_dict(), frozen)  # exclude_frozen_parameters leaves them to their base
    try:
        student.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint '{path}' is of another student: {' '.join(str(error).split())[:300]}") from error
    for compression in module.compressions:
        if compression.state_key in saved["callbacks"]:
            compression.load_state_dict(saved["callbacks"][compression.state_key])
    return student


def write(module: DistillModule, student: PreTrainedModel, folder: Path) -> None:
    """Write a folder that plain transformers loads, with the tokenizer of the data; one that is there is replaced."""
    write_folder(folder, lambda path: _save_student(module, student, path))


def _save_student(module: DistillModule, student: PreTrainedModel, path: Path) -> None:
    student.save_pretrained(path)  # safetensors, config, generation config
    module.data.tokenizer.save_pretrained(path)
