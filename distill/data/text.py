"""Plain text, of which every token is trained on, and prompts with completions, of which only the completions are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data.language import Encoder, LanguageFiles, bos
from distill.data.packing import Document


class TextData(LanguageFiles):
    """Documents of plain text; every token is trained on, and the end-of-sequence token closes each document.

    Args:
        text: the column that holds the document (a `.txt` file is one document in the column `text`).
        **common: see `LanguageFiles`, `LanguageData` and `DistillData`.
    """

    def __init__(self, text: str = "text", **common: Any) -> None:
        super().__init__(**common)
        self.text = text

    @property
    def columns(self) -> dict[str, bool]:
        """The text."""
        return {"text": True}

    def encoder(self) -> Encoder:
        """Encode the text, bos (if the tokenizer adds one by itself) before and eos after."""
        return _TextEncoder(self.tokenizer, self.text)


class PromptData(LanguageFiles):
    """Prompts and completions; only the completion and the end-of-sequence token after it are trained on.

    Both are tokenized on their own and concatenated: bos (if the tokenizer adds one by itself), prompt, completion, eos. A prompt
    that fills all of `max_length` is skipped and counted. Packing may cut a completion off its prompt at the end of a window.

    Args:
        prompt: the column of the prompt.
        completion: the column of the completion.
        **common: see `LanguageFiles`, `LanguageData` and `DistillData`.
    """

    cut_long = False

    def __init__(self, prompt: str = "prompt", completion: str = "completion", **common: Any) -> None:
        super().__init__(**common)
        self.prompt, self.completion = prompt, completion

    @property
    def columns(self) -> dict[str, bool]:
        """Prompt and completion."""
        return {"prompt": True, "completion": True}

    def encoder(self) -> Encoder:
        """Encode both, and mark the completion as trained on."""
        return _PromptEncoder(self.tokenizer, self.prompt, self.completion)


@dataclass(frozen=True)
class _TextEncoder:
    tokenizer: PreTrainedTokenizerBase
    column: str

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> list[Document]:
        before, after = bos(self.tokenizer), [self.tokenizer.eos_token_id]
        # an empty text is an empty document, not a bare eos
        texts = [_tokens([*before, *ids, *after] if ids else []) for ids in _encode(self.tokenizer, batch[self.column])]
        return [Document(ids, np.ones(len(ids), np.bool_)) for ids in texts]


@dataclass(frozen=True)
class _PromptEncoder:
    tokenizer: PreTrainedTokenizerBase
    prompt: str
    completion: str

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> list[Document]:
        prompts, completions = (_encode(self.tokenizer, batch[column]) for column in (self.prompt, self.completion))
        before, after = bos(self.tokenizer), [self.tokenizer.eos_token_id]
        documents = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = _tokens([*before, *prompt, *completion, *after] if completion else [])
            documents.append(Document(ids, np.arange(len(ids)) >= len(before) + len(prompt)))
        return documents


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: it would warn that a document is longer than the model's window, which is what rows are cut for
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _tokens(ids: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(ids, np.int32)
