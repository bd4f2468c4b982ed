"""What tests of the chapter on robustness need: rows, a linear model, the evidence of a tiny run."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distill.report.evidence import Evidence, Subject
from distill.tasks import CausalLM, SequenceClassification, Task
from distill.types import Batch, Outputs
from tests import models

CPU = torch.device("cpu")


def rows(count: int = 6, length: int = 8, seed: int = 0) -> list[Batch]:
    """Padded rows of a language model in batches of two; the first position of each has no label, and row i is i % 3 tokens shorter."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, count, 2):
        ids = torch.randint(3, models.VOCAB, (2, length), generator=rng)
        mask = (torch.arange(length) < torch.tensor([[length - (start + i) % 3] for i in range(2)])).long()
        labels = torch.where(mask.bool(), ids.roll(-1, 1), -100)
        labels[:, 0] = -100
        labels[torch.arange(2), mask.sum(1) - 1] = -100
        batches.append({"input_ids": torch.where(mask.bool(), ids, 0), "labels": labels, "attention_mask": mask})
    return batches


def told(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    """The same rows, labelled with what a model says itself: it is right everywhere."""
    found = []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        top = logits.argmax(-1) if logits.ndim == 3 else logits.argmax(-1)[:, None]
        found.append({**batch, "labels": torch.where(batch["labels"] == -100, -100, top) if logits.ndim == 3 else top})
    return found


class Linear(nn.Module):
    """Two classes, decided by a weight on every number of three embeddings: a model without any attention or layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.embedding, self.head = nn.Embedding(models.VOCAB, 4), nn.Linear(12, 2)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=rng)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class LinearTask(Task):
    """How that model is run."""

    unit = "sample"

    def outputs(self, model: nn.Module, batch: Batch, taps: Any = ()) -> Outputs:
        return Outputs(model.embedding(batch["input_ids"]).flatten(1)[:, None], model.head)

    def head(self, model: nn.Module) -> nn.Module:
        return model.head


def evidence(subjects: dict[str, nn.Module | None], batches: list[Batch], task: Task | None = None, **changes: Any) -> Evidence:
    """Evidence of a run of which a chapter on robustness or tasks can look at all it needs."""
    task = task or CausalLM()
    num_classes = models.VOCAB if task.unit == "token" else len(models.LABELS)
    words = models.tokenizer()
    given: dict[str, Any] = {
        "folder": Path("run"),
        "student": "student",
        "subjects": {
            name: Subject(partial(task.outputs, model) if model is not None else lambda batch: None, model)
            for name, model in subjects.items()
        },
        "task": task,
        "data": SimpleNamespace(tokenizer=words, num_classes=num_classes, pad_id=0, max_length=16),
        "device": CPU,
        "batches": batches,
        "observed": SimpleNamespace(of_rows=100),
        "run": {},
        "log": [],
        "config": {},
    }
    return Evidence(**(given | changes))


def texts(count: int = 6, length: int = 8) -> list[Batch]:
    """The rows of a classifier."""
    rng = torch.Generator().manual_seed(1)
    return [{**batch, "labels": torch.randint(len(models.LABELS), (2, 1), generator=rng)} for batch in rows(count, length)]


def kinds() -> dict[str, tuple[Task, nn.Module, list[Batch]]]:
    """A language model and a classifier with their rows."""
    return {
        "language model": (CausalLM(), models.causal_lm(), rows()),
        "classifier": (SequenceClassification(), models.classifier(), texts()),
    }


def plain_logits(model: nn.Module, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
    """Logits as transformers gives them, from embeddings if these are given: `[N, V]` of the valid positions."""
    inputs = {"input_ids": batch["input_ids"]} if embeddings is None else {"inputs_embeds": embeddings}
    logits = model(**inputs, attention_mask=batch["attention_mask"]).logits
    return (logits if logits.ndim == 3 else logits[:, None])[batch["labels"] != -100]
