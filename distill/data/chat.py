"""Conversations, of which only the assistant's turns are trained on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distill.data.base import Splits
from distill.data.language import Encoder, LanguageFiles
from distill.data.packing import Document
from distill.types import DataError


class ChatData(LanguageFiles):
    """Lists of messages `{"role": …, "content": …}`, written out by the tokenizer's chat template.

    Only tokens inside the template's `{% generation %}` … `{% endgeneration %}` are trained on.

    Args:
        messages: the column that holds the list.
        chat_template: path of a Jinja file to use in place of the tokenizer's own template.
        **common: see `LanguageFiles`, `LanguageData` and `DistillData`.
    """

    cut_long = False

    def __init__(self, messages: str = "messages", chat_template: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.messages, self.chat_template = messages, chat_template

    @property
    def columns(self) -> dict[str, bool]:
        """The messages."""
        return {"messages": False}

    def read(self) -> Splits:
        """Read the template first, because a missing file is found sooner than the data is read.

        Raises:
            DataError: the template's file is missing, or something is wrong with the data.
        """
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise DataError(f"data.chat_template: no file '{self.chat_template}'")
        return super().read()

    def encoder(self) -> Encoder:
        """Encode by the chat template.

        Raises:
            DataError: there is no template, or it does not mark the assistant's turns.
        """
        template = self.tokenizer.chat_template if self.chat_template is None else Path(self.chat_template).read_text(encoding="utf-8")
        if not isinstance(template, str):
            raise DataError(
                f"the tokenizer '{self.tokenizer_name}' has no chat template; give one as data.chat_template (a Jinja file), "
                "or use the tokenizer of a chat model"
            )
        if not re.search(r"{%-?\s*generation\s*-?%}", template):
            raise DataError(
                f"the chat template of {self.chat_template or repr(self.tokenizer_name)} does not mark what the assistant says; put "
                "{% generation %} and {% endgeneration %} around its turns, in a copy of the template given as data.chat_template"
            )
        self.tokenizer.chat_template = template  # so that a student saved with this tokenizer talks in the way it was trained
        return _ChatEncoder(self.tokenizer, self.messages, template)

    def _read_columns(self, source: str, key: str) -> datasets.Dataset:
        rows = super()._read_columns(source, key)
        batches = rows.with_format(None).iter(batch_size=1000)
        for number, conversation in enumerate((value for batch in batches for value in batch[self.messages]), start=1):
            if not _is_conversation(conversation):
                raise DataError(
                    f"'{source}' row {number}: '{self.messages}' must be a list of messages with the texts 'role' and 'content', "
                    f"but is {conversation!r:.80}"
                )
        return rows


@dataclass(frozen=True)
class _ChatEncoder:
    tokenizer: PreTrainedTokenizerBase
    column: str
    template: str

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> list[Document]:
        return [self.encode(conversation) for conversation in batch[self.column]]

    def encode(self, conversation: Sequence[Mapping[str, Any]]) -> Document:
        # Arrow gives every message the keys of all messages; templates ask which are there
        messages = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation {messages!r:.80}: {error}") from error
        trained = np.array(encoded["assistant_masks"], np.bool_)
        if _num_runs(trained) < _num_turns(messages):
            # transformers marks everything to the end where a span ends in a character that is part of no token
            raise DataError(
                f"the chat template marks more than the assistant's turns in {messages!r:.80}; let no white space that the tokenizer drops "
                "stand just before {% endgeneration %}"
            )
        return Document(np.array(encoded["input_ids"], np.int32), trained)


def _num_runs(trained: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(np.diff(trained.astype(np.int8), prepend=0) == 1))


def _num_turns(messages: Sequence[Mapping[str, Any]]) -> int:
    """Count the assistant's turns that someone else's words lie between."""
    said = [message["role"] == "assistant" for message in messages if message["content"].strip()]
    return sum(now and not before for before, now in pairwise([False, *said]))


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str) for message in value
    )
