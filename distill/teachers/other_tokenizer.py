"""A teacher whose tokenizer is not the student's: it reads the same text in its own tokens."""

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import AutoTokenizer

from distill import hub
from distill.tasks import Task, unwrap
from distill.teachers.base import Teacher
from distill.teachers.retold import Reteller, Retold
from distill.teachers.several import Several
from distill.teachers.spelling import spelling
from distill.teachers.workers import Workers
from distill.types import Batch, ConfigError, Outputs, Support

READ = ("input_ids", "labels", "attention_mask", "position_ids")
MUCH = 0.1  # a share of text left out that is worth a warning


class OtherTokenizer(Teacher):
    """Lets a teacher read the student's text in its own tokens, for terms that compare texts: `SpanLikelihood`, `ULD`.

    Its target is `Outputs` on the teacher's tokens; where they meet the student's is in the taps, see `spans.Alignment`. Each document is
    recovered byte by byte from the student's tokens and encoded anew, so the data stay as they are, packed or padded. With the student's
    own tokenizer all spans are single tokens; then a plain teacher says more.

        model:
          teacher:
            class_path: OtherTokenizer
            init_args:
              source: {class_path: OnlineTeacher, init_args: {model: org/teacher}}
          losses:
            ce: CrossEntropy
            kd: SpanLikelihood

    Args:
        source: the teacher proper, in memory or remote.
        tokenizer: a folder or hub id with its tokenizer; None for where its model is.
        revision: of `tokenizer` on the hub.

    Raises:
        ConfigError: the source is made of several teachers.
    """

    def __init__(self, source: Teacher, tokenizer: str | None = None, revision: str | None = None) -> None:
        if isinstance(source, Several):
            raise ConfigError(
                f"model.teacher.source is made of several teachers ({type(source).__name__}); take one that runs a model, e.g. "
                "OnlineTeacher"
            )
        self.source, self.name, self.revision = source, source.name, revision
        self.tokenizer = tokenizer or source.name
        self.checked: Any = None  # the data's tokenizer that passed
        self.said = False
        self.workers = Workers(1)
        self.coming: dict[bytes, Future[Retold]] = {}

    def recipe_needed(self) -> str | None:
        """Give the source's."""
        return self.source.recipe_needed()

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Make the source ready.

        Raises:
            ConfigError: the task is not to predict tokens, or the source does not give the probabilities of all of them.
        """
        if task.unit != "token":
            raise ConfigError(f"model.teacher: OtherTokenizer is for language models; the data want one class per {task.unit}")
        self.source.setup(task, device, dtype)
        if self.source.support != "classes":
            raise ConfigError(
                f"model.teacher.source: {type(self.source).__name__} holds a target on the student's tokens; take one that runs a model, "
                "e.g. OnlineTeacher"
            )

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Load the teacher's tokenizer, and make sure that it is the source's own, and that both can be told byte by byte."""
        if self.checked is tokenizer:
            return
        theirs = hub.load(AutoTokenizer, self.tokenizer, "model.teacher.tokenizer", revision=self.revision)
        self.reteller = Reteller(spelling(tokenizer, "data.tokenizer"), theirs, self._longest())
        self.num_tokens = len(self.reteller.teacher.tokens)
        special = {f"{name}_token_id": getattr(theirs, f"{name}_token_id") for name in ("bos", "eos")}
        self.source.check(theirs, {"vocab_size": self.num_tokens, "pad_token_id": self.reteller.teacher.pad, **special})
        self.checked = tokenizer

    def _longest(self) -> int | None:
        structure = self.source.structure()
        config = None if structure is None else unwrap(structure).config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)  # by its name in any architecture that counts them
        return positions if isinstance(positions, int) else None

    def ahead(self, batch: Batch) -> None:
        """Begin to tell the batch again, in a thread."""
        self.coming[_content(batch)] = self.workers.submit(partial(self.reteller, batch))

    def __call__(self, batch: Batch, taps: Iterable[str] = ()) -> Outputs:
        """Run the source on its own tokens."""
        device = batch["input_ids"].device
        here = {name: batch[name].cpu() for name in READ if name in batch}
        coming = self.coming.pop(_content(here), None)
        retold = self.reteller(here) if coming is None else coming.result()
        if not self.said:
            (rank_zero_warn if retold.lost > MUCH * retold.labels else rank_zero_info)(retold.summary())
            self.said = True
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in retold.inputs.items()}
        target = self.source(inputs, taps)
        assert isinstance(target, Outputs), "a target on all classes"
        found = target.taps | retold.alignment.to(device).taps()
        return replace(target, head=OwnTokens(target.head, self.num_tokens), taps=found)

    @property
    def support(self) -> Support:
        """Only the text is the same."""
        return "text"

    def spread(self, strategy: Strategy) -> None:
        """Spread the source."""
        self.source.spread(strategy)

    def beside(self, student: nn.Module) -> None:
        """Show the source the student."""
        self.source.beside(student)

    def models(self) -> list[nn.Module]:
        """Give the source's."""
        return self.source.models()

    def structure(self) -> nn.Module | None:
        """Give the source's."""
        return self.source.structure()

    def describe(self) -> dict[str, Any]:
        """Give what the source counted."""
        return self.source.describe()


class OwnTokens(nn.Module):
    """A head without the rows that pad the vocabulary.

    Args:
        head: the teacher's.
        num_tokens: of its tokenizer.
    """

    def __init__(self, head: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.head, self.num_tokens = head, num_tokens

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[..., D]` to logits `[..., V]`."""
        logits: Tensor = self.head(features)[..., : self.num_tokens]
        return logits


def _content(batch: Batch) -> bytes:
    """What a batch is known by again: rows of different splits may have one number."""
    return b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "labels"))
