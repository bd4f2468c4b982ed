"""The teacher: what is known of it without its weights, and how fast it is here."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, PreTrainedModel

from distill import hub
from distill.advise.blocks import random_batch
from distill.advise.parts import Figure
from distill.advise.shapes import Weights, on_meta, weights_of
from distill.report.costs import cost
from distill.report.costs.served import logits_of
from distill.tasks import CausalLM, SequenceClassification, Task
from distill.types import ConfigError

TASKS: dict[str, type[Task]] = {"causal-lm": CausalLM, "classification": SequenceClassification}
HEADS = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForSequenceClassification": "classification"}
ROOM = 0.5  # of the free memory that a model to be timed may take
SECONDS = 10.0  # that the whole model is timed for, about


@dataclass(frozen=True)
class Teacher:
    """A model, from its configuration alone.

    Attributes:
        name: folder or hub id.
        task_name: of `TASKS`.
        task: the same.
        config: of transformers.
        model: without weights.
        weights: counted.
        item: bytes of a value as it is stored.
        bytes: of its files.
        headless: whether its config names no head for this task, so that one has to be trained first.
    """

    name: str
    task_name: str
    task: Task
    config: Any
    model: PreTrainedModel
    weights: Weights
    item: int
    bytes: Figure
    headless: bool


def read(name: str, task_name: str | None) -> Teacher:
    """Read a teacher's configuration and count it.

    Args:
        name: a folder or a hub id.
        task_name: of `TASKS`; None to guess it from the config's `architectures`.

    Raises:
        ConfigError: it is not there, the task cannot be guessed, or it is no model of that task.
    """
    config = hub.load(AutoConfig, name, "--teacher")
    architectures = config.architectures or []
    guessed = next((task for end, task in HEADS.items() if any(each.endswith(end) for each in architectures)), None)
    if task_name is None and guessed is None:
        raise ConfigError(
            f"--task: '{name}' is a {', '.join(architectures) or 'model of unknown architecture'}, which says nothing of its task; "
            f"say --task {' or --task '.join(TASKS)}"
        )
    chosen = task_name or str(guessed)
    task = TASKS[chosen]()
    try:
        model = on_meta(task, config)
    except ValueError as error:
        raise ConfigError(f"--task: '{name}' cannot be a {chosen} model: {' '.join(str(error).split())[:200]}") from error
    weights = weights_of(model)
    dtype = config.dtype or torch.float32
    item = dtype.itemsize
    files = Path(name)
    on_disk = sum(file.stat().st_size for file in files.glob("*.safetensors")) if files.is_dir() else 0
    size = Figure(float(on_disk), True, "its files") if on_disk else Figure(float(item * weights.parameters), False, "counted")
    return Teacher(name, chosen, task, config, model, weights, item, size, guessed is None)


def length_of(teacher: Teacher, length: int) -> int:
    """A length that the model can take."""
    most = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    return min(length, most) if most else length


def timed(teacher: Teacher, length: int, device: str, batch: int = 8) -> tuple[cost.Run, cost.Cost] | None:
    """Time the whole model with random weights, which are as fast as others; None where it does not fit into memory.

    Args:
        teacher: to be built.
        length: positions of a row.
        device: `cpu` or `cuda`.
        batch: rows of the large batch.

    Returns:
        What runs it, and its cost.
    """
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if 4 * teacher.weights.parameters > ROOM * free:
        return None
    model: Any = teacher.task.build(teacher.config).eval().to(device)
    one, many = (random_batch(teacher.config, rows, length, device) for rows in (1, batch))
    with torch.inference_mode():
        run = partial(logits_of, model)
        candidate = {"teacher": cost.Candidate(run, model)}
        first = cost.measure(candidate, one, many, 2, 1)["teacher"]
        rounds = int(SECONDS / (first.latency_ms / 1e3 + batch / first.throughput))
        return run, cost.measure(candidate, one, many, min(20, rounds), 0)["teacher"] if rounds > 2 else first
