"""From what the YAML names to the sizes of a plan: nothing is loaded but the configurations of the models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from distill import hub
from distill.data.base import DistillData
from distill.layers import Layers, layers_of
from distill.losses.base import Loss, Setting, Term, TokenLoss
from distill.losses.chunked import block_size, chunk_size
from distill.module import DistillModule
from distill.plan import models
from distill.plan.job import Job
from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.online import OnlineTeacher
from distill.types import ConfigError

Students = Callable[[str], tuple[DistillModule, Any]]  # a recipe's file -> its module and the arguments of its data


@dataclass(frozen=True)
class Described:
    """A job, and what it was read from, to build the models for a measurement.

    Attributes:
        job: the sizes.
        task: of the data.
        student: configuration of transformers.
        teacher: the same, or None.
        terms: prepared, by name.
    """

    job: Job
    task: Task
    student: Any
    teacher: Any | None
    terms: dict[str, Term]


def describe(module: DistillModule, data: DistillData, config: Any, recipe: Students, device: str = "cuda") -> Described:
    """Describe a step.

    Args:
        module: as the YAML makes it; its student is not built.
        data: the same; not read.
        config: the resolved configuration of `fit`: the keys of `trainer` and `data` are read.
        recipe: parses a config that would make the teacher, where its folder does not exist yet.
        device: that the job is for.

    Raises:
        ConfigError: a model's configuration cannot be read, or a class is unknown to the plan.
    """
    task, given = data.task(), config.data.init_args
    teacher_config = _teacher_config(module, data, recipe)
    expected = _expected(given, teacher_config, task)
    recipe_of_student = module.recipe_of_student
    student_config = recipe_of_student.blueprint(task, expected)
    student = models.on_meta(task, student_config, recipe_of_student.attn_implementation, recipe_of_student)
    teacher = None
    asked = _asked(module.teacher)
    if teacher_config is not None and isinstance(asked, OnlineTeacher):
        teacher = models.on_meta(task, teacher_config, asked.attn_implementation)
    text = student_config.get_text_config()
    classes = text.num_labels if task.unit == "sample" else text.vocab_size
    terms = _prepared(module, data, classes, student, teacher, given)
    job = _job(module, data, config, classes, student, teacher, terms, torch.device(device))
    return Described(job, task, student_config, teacher_config, terms)


def _asked(teacher: Teacher | None) -> Teacher | None:
    """The teacher whose layers the terms know: of a store, the one that it was written by."""
    return teacher.source if isinstance(teacher, CachedTeacher) else teacher


def _teacher_config(module: DistillModule, data: DistillData, recipe: Students) -> Any | None:
    teacher = _asked(module.teacher)
    if teacher is None:
        return None
    if not isinstance(teacher, OnlineTeacher):
        raise ConfigError(f"plan knows the teacher OnlineTeacher, got {type(teacher).__name__}; use fit --dry-run instead")
    if path := teacher.recipe_needed():
        made, given = recipe(path)
        return made.recipe_of_student.blueprint(data.task(), _expected(given, None, data.task()))
    return models.config_of(teacher.name, "model.teacher.model", teacher.revision)


def _expected(given: Any, teacher: Any | None, task: Task) -> dict[str, Any]:
    """What the data will say of a new model: classes as the teacher has them, else as the data's arguments or their tokenizer say."""
    if task.unit == "sample":
        return {"num_labels": 2 if teacher is None else teacher.num_labels}
    if size := given.get("vocab_size"):
        return {"vocab_size": size}
    if teacher is not None:
        return {"vocab_size": teacher.get_text_config().vocab_size}
    if not given.get("tokenizer"):
        raise ConfigError("plan cannot tell the size of the vocabulary; set data.tokenizer, or model.student.config.vocab_size")
    return {"vocab_size": len(hub.load(AutoTokenizer, given.tokenizer, "data.tokenizer"))}


def _prepared(
    module: DistillModule, data: DistillData, classes: int, student: nn.Module, teacher: nn.Module | None, given: Any
) -> dict[str, Term]:
    """Prepare the terms on models without weights, so that they choose layers and make projectors, these without memory too."""
    common: dict[str, Any] = {
        "unit": data.task.unit,
        "num_classes": classes,
        "class_counts": lambda: torch.ones(classes, dtype=torch.long, device="cpu"),
        "class_name": str,
        "num_samples": classes,
        "batch_size": data.batch_size,
        "micro_batch": data.batch_size,
        "packed": bool(given.get("pack")),
        "student": layers_of(student, "model.student"),
        "teacher": None if teacher is None else layers_of(teacher, "model.teacher"),
    }
    with torch.device("meta"):
        for name, term in module.terms.items():
            term.prepare(Setting(key=f"model.losses.{name}", **common))
    return module.terms


def _job(
    module: DistillModule,
    data: DistillData,
    config: Any,
    classes: int,
    student: nn.Module,
    teacher: nn.Module | None,
    terms: dict[str, Term],
    device: torch.device,
) -> Job:
    precision = _precision(str(config.trainer.precision or "32-true"))
    on_taps = [term for term in terms.values() if isinstance(term, Loss)]
    length = int(config.data.init_args.get("max_length") or 512)
    tap = lambda layers, names: sum(_tap_width(layers, name, length) for name in names)  # noqa: E731
    ours = layers_of(student, "model.student")
    theirs = ours if teacher is None else layers_of(teacher, "model.teacher")
    every = config.trainer.log_every_n_steps
    return Job(
        student=models.shape_of(student, "model.student"),
        teacher=None if teacher is None or isinstance(module.teacher, CachedTeacher) else models.shape_of(teacher, "model.teacher"),
        batch=data.batch_size,
        length=length,
        accumulate=config.trainer.accumulate_grad_batches or 1,
        precision=precision,
        checkpointing=module.recipe_of_student.gradient_checkpointing,
        teacher_bytes=_teacher_bytes(module, precision),
        unit=data.task.unit,
        classes=classes,
        chunk=module.chunk or chunk_size(classes, device),
        block=block_size(classes, device),
        terms=sum(isinstance(term, TokenLoss) for term in terms.values()),
        norms=module.balancer.wants_norms(0) or every is None or every > 0,
        exact=len(terms) if module.balancer.exact_every else 0,
        own=sum(p.numel() for term in terms.values() for p in term.parameters()),
        teacher_taps=tap(theirs, {name for term in on_taps for name in term.teacher_taps}),
        compared=sum(tap(ours, term.student_taps) + tap(theirs, term.teacher_taps) for term in on_taps),
        device=device.type,
    )


def _tap_width(layers: Layers, name: str, length: int) -> int:
    """Values per position of a tap: the width of a submodule's output, or of attention maps `heads · T`."""
    path, _, which = name.partition(":")
    return layers.heads * length if which.isdecimal() else layers.widths.get(path, layers.width)


def _precision(name: str) -> str:
    known = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # Lightning's short names
    return known.get(name, name)


def _teacher_bytes(module: DistillModule, precision: str) -> int:
    dtype = module.teacher.dtype if isinstance(module.teacher, OnlineTeacher) else "auto"
    return (4 if precision.startswith("32") else 2) if dtype == "auto" else getattr(torch, dtype).itemsize
